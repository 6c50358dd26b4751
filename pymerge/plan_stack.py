"""Which input tensors each output tensor is made of, be the output put together from slices or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pymerge.methods import Method
from pymerge.plan_checks import Input, check_dtypes, check_pairs
from pymerge.plan_layers import Layers, depth
from pymerge.plan_optional import Row, is_optional, reduced
from pymerge.plan_rule import Origin, Part
from pymerge.text import shown

# Dotted parts of names that come before the layers; what else stands outside them comes after.
_FIRST = ("wte", "wpe", "shared")
_LAST = ("embed_out",)


class Outline(NamedTuple):
    """The output before it is laid out.

    `counts`: how many layers each part has, as far as is known. `layers`: with slices, the layer that each
    output layer is in the first source of its slice.
    """

    origins: Sequence[Origin] = ()
    counts: Sequence[int] = ()
    layers: Sequence[int] = ()


def whole(names: Sequence[Sequence[str]], members: Sequence[Sequence[Input]], depths: bool) -> Outline:
    """Without slices: every tensor is made of those of its name; `names` and `members` of each part.

    `depths`: whether parameters ask for `t`.
    """
    layers = Layers([name for some in names for name in some]) if depths else None
    origins = []
    for number, (some, inputs) in enumerate(zip(names, members, strict=True)):
        table, count = inputs[0].checkpoint.tensors, len(inputs)
        for name in some:
            t = layers.depth(name) if layers else 0.0
            origins.append(Origin(name, number, t, table[name].entry.dtype.mergeable, (name,) * count))
    return Outline(origins, [max(map(len, layers.stacks.values()), default=0) if layers else 0])


def stacked(
    method: Method | None,
    parts: list[Part],
    members: list[list[Input]],
    problems: list[str],
    notes: list[str],
) -> Outline:
    """The layers of all slices one after the other, and what is outside the layers; problems are added.

    So are parts, and their members, for the tensors that some sources of a slice lack.
    """
    before = len(problems)
    models: dict[str, _Model] = {}
    for source in {source.label: source for sources in members for source in sources}.values():
        check_dtypes(source, problems)
        models[source.label] = _Model(source, problems)
    if len(problems) > before:
        return Outline()
    taken = [
        [_Taken(models[s.label], e.layers or range(0)) for e, s in zip(part.members, inputs, strict=True)]
        for part, inputs in zip(parts, members, strict=True)
    ]
    for part, sources in zip(parts, taken, strict=True):
        _check_layers(part, sources, problems)
    if len(problems) > before:
        return Outline()
    last = len(parts) - 1
    outside = [*_outside(0, taken[0], first=True), *_outside(last, taken[last], first=False)]
    origins = list(outside)
    layers: list[int] = []
    for number, sources in enumerate(taken):
        begin = taken[0][0].model.run.start + len(layers)
        origins += _layered(number, sources, begin)
        layers += sources[0].layers
    notes += _notes(outside, [len(sources) for sources in members])
    found: list[Origin] = []
    for number in range(len(parts)):
        own = [origin for origin in origins if origin.part == number]
        found += _with_reduced(method, number, own, parts, members, problems, notes)
    return Outline(found, [len(sources[0].layers) for sources in taken], layers)


def _with_reduced(
    method: Method | None,
    number: int,
    origins: Sequence[Origin],
    parts: list[Part],
    members: list[list[Input]],
    problems: list[str],
    notes: list[str],
) -> Iterator[Origin]:
    """The origins of one slice, those that some sources lack in parts of their own, which are added."""
    tables = [source.checkpoint.tensors for source in members[number]]
    lacking: dict[Row, tuple[bool, ...]] = {}
    for origin in origins if method else ():
        has = tuple([name in table for name, table in zip(origin.inputs, tables, strict=True)])
        if not all(has) and is_optional(origin.name):
            lacking[origin.inputs] = has
    by_row = {origin.inputs: origin for origin in origins}
    complete = [origin for origin in origins if origin.inputs not in lacking]
    check_pairs(members[number], [origin.inputs for origin in complete], problems)
    yield from complete
    for some in reduced(method, parts[number], members[number], lacking, problems, notes) if method else ():
        parts.append(some.part)
        members.append(some.holders)
        table = some.holders[0].checkpoint.tensors
        for row, own in some.rows.items():
            merges = table[own[0]].entry.dtype.mergeable
            yield by_row[row]._replace(part=len(parts) - 1, merges=merges, inputs=own)


class _Taken(NamedTuple):
    """The layers that a slice takes of one model, counted from 0."""

    model: _Model
    layers: range

    def layer(self, index: int) -> int:
        """The number in its own tensors' names of the layer that gives the slice's layer `index`."""
        return self.model.run.start + self.layers[index]


def _check_layers(part: Part, sources: Sequence[_Taken], problems: list[str]) -> None:
    """The layers must exist, and be as many in every source."""
    for entry, (model, layers) in zip(part.members, sources, strict=True):
        if layers.stop > len(model.run):
            problems.append(
                f"{part.where}: layers {layers.start} to {layers.stop - 1} of {entry.path},"
                f" which has 0 to {len(model.run) - 1}"
            )
    counts = [len(source.layers) for source in sources]
    if len(set(counts)) > 1:
        listed = ", ".join(f"{n} of {e.path}" for n, e in zip(counts, part.members, strict=True))
        problems.append(f"{part.where}: every source must give as many layers, found {listed}")


def _layered(number: int, sources: Sequence[_Taken], begin: int) -> Iterator[Origin]:
    """The tensors of one slice's layers, which are numbered from `begin` on in the output."""
    first = sources[0]
    count = len(first.layers)
    for index in range(count):
        at = [(source.model, source.layer(index)) for source in sources]
        for rest in dict.fromkeys(rest for model, layer in at for rest in model.layers[layer]):
            inputs = tuple([f"{model.stack}.{layer}{rest}" for model, layer in at])
            name = f"{first.model.stack}.{begin + index}{rest}"
            yield Origin(name, number, depth(index, count), first.model.merges(inputs[0]), inputs)


def _outside(number: int, sources: Sequence[_Taken], first: bool) -> Iterator[Origin]:
    """What comes before the layers, or after them."""
    for name in dict.fromkeys(name for source in sources for name in source.model.outside):
        if is_first(name) is first:
            yield Origin(name, number, 0.0, sources[0].model.merges(name), (name,) * len(sources))


def _notes(outside: Sequence[Origin], sources: Sequence[int]) -> Iterator[str]:
    """Which slice gives what lies outside the layers; `sources`: how many each slice has."""
    last = len(sources) - 1
    for number in (0, last) if last else ():
        names = [origin.name for origin in outside if origin.part == number]
        if names:
            listed = ", ".join(map(shown, names[:3])) + (", ..." if len(names) > 3 else "")
            yield f"outside the layers: {listed} from the sources of slices[{number}]"
    if sources[last] > sources[0]:
        yield (
            f"all {sources[last]} sources of slices[{last}] give what comes after the layers; mergekit 0.1.5"
            f" leaves out those past the {sources[0]} of slices[0]"
        )


class _Model:
    """One input, its tensors by layer."""

    def __init__(self, source: Input, problems: list[str]) -> None:
        self._tensors = source.checkpoint.tensors
        layers = Layers(self._tensors)
        self.stack, self.run = _main_stack(source, layers.stacks, problems)
        self.layers: dict[int, list[str]] = {number: [] for number in self.run}
        self.outside: list[str] = []
        for name in self._tensors:
            place = layers.place(name)
            if place is not None and place.stack == self.stack:
                self.layers[place.number].append(place.rest)
            else:
                self.outside.append(name)

    def merges(self, name: str) -> bool:
        """Whether the tensor called `name` holds numbers to merge."""
        ref = self._tensors.get(name)
        return ref is not None and ref.entry.dtype.mergeable


def _main_stack(source: Input, stacks: Mapping[str, range], problems: list[str]) -> tuple[str, range]:
    if len(stacks) == 1:
        return next(iter(stacks.items()))
    if not stacks:
        problems.append(f"slices: no tensor of {source.label} has the number of a layer in its name")
    else:
        listed = " and ".join(f"{stack} ({len(run)})" for stack, run in stacks.items())
        problems.append(f"slices: {source.label} has several stacks of layers: {listed}")
    return "", range(0)


def is_first(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings do, norms and heads do not."""
    parts = name.lower().split(".")
    return any((part in _FIRST or "emb" in part) and part not in _LAST for part in parts)
