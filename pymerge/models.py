"""Merging whole models in memory: torch modules, or dicts of tensors as `state_dict()` gives them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pymerge.backends.arrays import Array, ArrayKind, dtype_name, kind_of
from pymerge.dtypes import BY_TORCH_NAME
from pymerge.errors import BackendError, RecipeError
from pymerge.methods import Base, method_named
from pymerge.operands import expert_list, what
from pymerge.options import as_name
from pymerge.tensor_rule import known_options
from pymerge.tensors import merge_tensors

# Messages about names list so many.
NAMES_SHOWN = 3
# What torch calls the entry of a state dict that may hold anything.
EXTRA_STATE = "_extra_state"


class Model(NamedTuple):
    """Tensors by name, and what messages call the model they are of. `rest`: entries without tensors."""

    role: str
    tensors: Mapping[str, Array]
    rest: Mapping[str, object]


class Choice(NamedTuple):
    """Which names are to be merged: shell patterns of whole names. `only` None: all."""

    only: tuple[str, ...] | None
    exclude: tuple[str, ...]

    def takes(self, name: str) -> bool:
        """Whether the tensor called `name` is to be merged."""
        taken = self.only is None or any(fnmatchcase(name, pattern) for pattern in self.only)
        return taken and not any(fnmatchcase(name, pattern) for pattern in self.exclude)


class Tied(NamedTuple):
    """Names that stand for one tensor, in the order of the model; nearly always a single one."""

    names: tuple[str, ...]

    def of(self, model: Model) -> Array | None:
        """The tensor under the first of the names that `model` has."""
        return next((model.tensors[name] for name in self.names if name in model.tensors), None)


def merge_state_dicts(
    base: object | None,
    experts: Iterable[object],
    *,
    method: str = "ties",
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge models into a new state dict with the names of the base, or without a base of the first expert.

    `base`, each of `experts`: a torch module or a dict of tensors (torch or numpy) by name; never modified.
    `method` and `options`: as in `merge_tensors`, but `out`. Floats are merged, running statistics too;
    `only` and `exclude` (patterns such as "*.mlp.*", of whole names) say which. The rest is copied from the
    base: what is not chosen, integers and bools (counters, position ids), extra state; the experts need
    neither have it nor agree on it. Names that share one tensor in the first model and have equal values in
    the others are merged once and share the result.
    Raises RecipeError for wrong options, BackendError for models that differ in names, shapes or kinds.
    """
    members = _experts(experts)
    origin = None if base is None else _model("base", base)
    first, others = (members[0], members[1:]) if origin is None else (origin, members)
    choice = _choice(only, exclude, [first, *others])
    groups = [part for group in _groups(first, choice) for part in _untied(group, others)]
    merged = _merged(first, _inputs(first, others, groups, choice), origin, members, method, options)
    results = {name: merged[group.names[0]] for group in groups for name in group.names}
    copies = {name: _kind(x).clone(x) for name, x in first.tensors.items() if name not in results}
    values = {**results, **copies, **first.rest}
    return {name: values[name] for name in (*first.tensors, *first.rest)}


def merge_into(
    model: object,
    experts: Iterable[object],
    *,
    base: object | None = None,
    method: str = "ties",
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **options: Any,
) -> None:
    """Merge `experts` into the parameters and buffers of `model`, in place: their addresses stay.

    `model`: a torch module or a dict of tensors. `base`: None: the model itself as it is before, where the
    method needs a base; otherwise its former values do not count. The other arguments are those of
    `merge_state_dicts`; what is not merged stays as it is in the model. Results are rounded to the
    model's types. The whole result is computed before the first element is written, which takes as much
    memory again; nothing has changed when this raises: RecipeError, BackendError, CheckpointError.
    """
    target, members = _model("model", model), _experts(experts)
    needed = method_named(as_name(method, "method")).base in (Base.ORIGIN, Base.FIRST)
    origin = _model("base", base) if base is not None else target if needed else None
    others = members if origin is None or origin is target else [origin, *members]
    choice = _choice(only, exclude, [target, *others])
    groups = _groups(target, choice)
    _check_apart(groups, target)
    own = _addresses(model) if _is_module(model) else None
    for group in groups:
        _check_target(group, target, own)
        _check_tied(group, target, others)
    merged = _merged(target, _inputs(target, others, groups, choice), origin, members, method, options)
    for name, result in merged.items():
        _kind(result).copy(result, target.tensors[name])


def _experts(experts: Iterable[object]) -> list[Model]:
    if _is_module(experts):  # some of them, such as Sequential, can be iterated
        raise BackendError(f"experts is {what(experts)}, expected a list of models")
    members = [_model(f"expert {k}", expert) for k, expert in enumerate(expert_list(experts))]
    if not members:
        raise BackendError("experts is an empty list, expected at least one model")
    return members


def _model(role: str, given: Any) -> Model:
    """The tensors of a module or a dict. Raises BackendError for anything else."""
    if not _is_module(given) and not isinstance(given, Mapping):
        raise BackendError(f"{role} is {what(given)}, expected a torch module or a dict of tensors")
    state = given.state_dict() if _is_module(given) else given
    if not isinstance(state, Mapping):
        raise BackendError(f"{role}: state_dict() gives {what(state)}, expected a dict of tensors")
    for name in state:
        if not isinstance(name, str):
            raise BackendError(f"{role} has a tensor named {name!r}, but names must be text")
    rest = {name: value for name, value in state.items() if str(name).endswith(EXTRA_STATE)}
    tensors = {name: value for name, value in state.items() if name not in rest}
    for name, value in tensors.items():
        if kind_of(value) is None:
            raise BackendError(f"{role}: {name!r} is {what(value)}, expected a tensor")
        if hasattr(value, "materialize"):  # torch's lazy modules before their first call
            raise BackendError(f"{role}: {name!r} has no shape before the model is called for the first time")
    return Model(role, tensors, rest)


def _is_module(given: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.nn.Module)


def _choice(
    only: str | Iterable[str] | None, exclude: str | Iterable[str] | None, models: Sequence[Model]
) -> Choice:
    """RecipeError for a pattern that no name matches: it would do nothing, silently."""
    choice = Choice(
        None if only is None else _patterns("only", only),
        () if exclude is None else _patterns("exclude", exclude),
    )
    for option, patterns in (("only", choice.only or ()), ("exclude", choice.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for model in models for name in model.tensors):
                raise RecipeError(f"{option}: no tensor is called {pattern!r}")
    return choice


def _patterns(option: str, given: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        return (as_name(given, option),)
    return tuple(as_name(pattern, option) for pattern in given)


def _groups(model: Model, choice: Choice) -> list[Tied]:
    """The tensors of `model` that are to be merged, the tied ones together."""
    tied: dict[object, list[str]] = {}
    for name, array in model.tensors.items():
        if _is_float(array) and choice.takes(name):
            tied.setdefault(_memory(array) or name, []).append(name)
    return [Tied(tuple(names)) for names in tied.values()]


def _is_float(array: Array) -> bool:
    """Whether it is merged: all but integers and bools; merge_tensors refuses what it does not know."""
    dtype = BY_TORCH_NAME.get(dtype_name(array.dtype))
    return dtype is None or not dtype.copyable


def _kind(array: Array) -> ArrayKind:
    kind = kind_of(array)
    assert kind is not None  # _model has seen it
    return kind


def _memory(array: Array) -> object:
    """What two names of one tensor have in common; None for a tensor without memory."""
    kind = _kind(array)
    if kind.count(array) == 0 or kind.fault(array) is not None:
        return None
    return kind.bounds(array), kind.shape(array), kind.strides(array), dtype_name(array.dtype)


def _untied(group: Tied, others: Sequence[Model]) -> list[Tied]:
    """The group as it is where all models have one value for its names, or else its names one by one."""
    if all(_is_tied(group, model) for model in others):
        return [group]
    return [Tied((name,)) for name in group.names]


def _check_tied(group: Tied, target: Model, others: Sequence[Model]) -> None:
    for model in others:
        if not _is_tied(group, model):
            names = " and ".join(map(repr, group.names))
            raise BackendError(
                f"{model.role} has different values for {names}, which are one tensor in the {target.role}"
            )


def _is_tied(group: Tied, model: Model) -> bool:
    arrays = [model.tensors[name] for name in group.names if name in model.tensors]
    return all(_same(arrays[0], array) for array in arrays[1:])


def _same(one: Array, other: Array) -> bool:
    memory, kind = _memory(one), _kind(one)
    if one is other or (memory is not None and memory == _memory(other)):
        return True
    alike = kind is kind_of(other) and one.dtype == other.dtype and kind.device(one) == kind.device(other)
    return alike and kind.equal(one, other)


def _check_target(group: Tied, target: Model, own: Collection[int] | None) -> None:
    """BackendError for a tensor that could not be written once everything is computed.

    `own`: where a module's parameters and buffers lie.
    """
    name = group.names[0]
    array = target.tensors[name]
    fault = _kind(array).write_fault(array)
    if fault is not None:
        raise BackendError(f"tensor {name!r}: {target.role} {fault}")
    if own is not None and _kind(array).count(array) and array.untyped_storage().data_ptr() not in own:
        raise BackendError(f"tensor {name!r}: state_dict() of the {target.role} gives a copy of it")


def _addresses(module: Any) -> set[int]:
    own = (*module.parameters(), *module.buffers())
    return {int(x.untyped_storage().data_ptr()) for x in own}


def _check_apart(groups: Sequence[Tied], target: Model) -> None:
    """BackendError where writing one tensor would change another that is not the same."""
    group_of = {name: number for number, group in enumerate(groups) for name in group.names}
    spans = []
    for name, array in target.tensors.items():
        if _memory(array) is not None:
            spans.append((*_kind(array).bounds(array), name))
    end, last = 0, ""
    for start, stop, name in sorted(spans):
        several = last and start < end and group_of.get(name, -1) != group_of.get(last, -2)
        if several and (name in group_of or last in group_of):
            raise BackendError(
                f"{last!r} and {name!r} of the {target.role} share memory, so neither can be merged alone"
            )
        if stop > end:
            end, last = stop, name


def _inputs(
    first: Model, others: Sequence[Model], groups: Sequence[Tied], choice: Choice
) -> dict[str, dict[str, Array]]:
    """The tensors of each model by its role, one for each group, under its first name.

    Raises BackendError where a model has not the names of the first.
    """
    for model in others:
        missing = [group.names[0] for group in groups if group.of(model) is None]
        odd = [
            name
            for name, array in model.tensors.items()
            if name not in first.tensors and choice.takes(name) and _is_float(array)
        ]
        if missing or odd:
            raise BackendError(
                f"{model.role} does not have the tensors of the {first.role}:"
                f" {_some(len(missing), 'missing', missing)}, {_some(len(odd), 'more', odd)}"
            )
    return {model.role: {group.names[0]: group.of(model) for group in groups} for model in (first, *others)}


def _some(count: int, kind: str, names: Sequence[str]) -> str:
    """How many, and the first of their names."""
    shown = ", ".join(map(repr, names[:NAMES_SHOWN])) + (", ..." if count > NAMES_SHOWN else "")
    return f"{count:,} {kind} ({shown})" if names else f"{count:,} {kind}"


def _merged(
    first: Model,
    inputs: Mapping[str, Mapping[str, Array]],
    base: Model | None,
    experts: Sequence[Model],
    method: str,
    options: Mapping[str, Any],
) -> Mapping[str, Array]:
    """The result of each group under its first name."""
    if "out" in options:
        raise RecipeError("out is an option of merge_tensors only; merge_into writes into a model")
    options = known_options(options, ("out_dtype", "threads", "backend"))
    origin = None if base is None else inputs[base.role]
    merged: Mapping[str, Array] = merge_tensors(
        origin, [inputs[expert.role] for expert in experts], method=method, **options
    )
    return merged
