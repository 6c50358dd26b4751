"""Which layer a tensor belongs to, read from its name; no table of architectures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """A tensor in a stack: layer `number` of those under `stack`, and what follows in its name."""

    stack: str
    number: int
    rest: str

    def name(self, number: int) -> str:
        """The same tensor of another layer."""
        return f"{self.stack}.{number}{self.rest}"


class Layers:
    """The stacks of layers that tensor names tell of.

    A tensor's layer is the first whole number among the dotted parts of its name whose siblings form a run,
    such as 7 in model.layers.7.mlp.experts.3.up; a run of one counts only where there is no longer one.
    """

    def __init__(self, names: Collection[str]) -> None:
        found: dict[str, set[int]] = {}
        for name in names:
            for place in _places(name):
                found.setdefault(place.stack, set()).add(place.number)
        runs = {
            stack: range(min(numbers), max(numbers) + 1)
            for stack, numbers in found.items()
            if stack and max(numbers) - min(numbers) + 1 == len(numbers)
        }
        long = {stack: run for stack, run in runs.items() if len(run) > 1}
        self._runs = long or runs
        places = (self.place(name) for name in names)
        used = {place.stack for place in places if place}
        # Runs inside layers, such as a layer's experts, are no stacks.
        self.stacks: Mapping[str, range] = {s: run for s, run in self._runs.items() if s in used}

    def place(self, name: str) -> Place | None:
        """Where the tensor called `name` stands; None outside all layers."""
        return next((place for place in _places(name) if place.stack in self._runs), None)

    def depth(self, name: str) -> float:
        """0 in the first layer of a stack, 1 in its last or only one; 0 outside all layers."""
        place = self.place(name)
        if place is None:
            return 0.0
        run = self.stacks[place.stack]
        return depth(place.number - run.start, len(run))


def depth(index: int, count: int) -> float:
    """The `t` of layer `index` of `count`."""
    return index / (count - 1) if count > 1 else 1.0


def _places(name: str) -> Iterator[Place]:
    """Every whole number among the dotted parts of `name`, as a layer."""
    end = 0
    while (begin := name.find(".", end)) >= 0:
        end = name.find(".", begin + 1)
        part = name[begin + 1 : end] if end >= 0 else name[begin + 1 :]
        # Written as numbers are, so that it can be renumbered; nothing has a million layers.
        if part.isascii() and part.isdecimal() and len(part) < 7 and (part == "0" or part[0] != "0"):
            yield Place(name[:begin], int(part), "" if end < 0 else name[end:])
        if end < 0:
            return
