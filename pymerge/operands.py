"""The arrays of one merge in memory, checked: what every backend may rely on, and where results go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from pymerge.backends.arrays import NUMPY, Array, ArrayKind, dtype_name, kind_of
from pymerge.collector import collector_paused
from pymerge.dtypes import BY_TORCH_NAME, DType, promote
from pymerge.errors import BackendError


class Item(NamedTuple):
    """Something given, and what messages call it: its role ("base", "expert 2", "out") and tensor name."""

    role: str
    value: Any
    name: str = ""

    def __str__(self) -> str:
        return f"tensor {self.name!r}: {self.role}" if self.name else self.role


class Facts(NamedTuple):
    """What must agree between arrays: kind and device over the whole merge, the rest for each tensor."""

    kind: ArrayKind
    device: str
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Operands:
    """Inputs of one kind on one device, by tensor name: float types, or integers equal in all inputs.

    `arrays`: in any layout, the base first where there is one. `dtypes`: what each tensor's types promote to.
    `first`: the first input as it was given.
    """

    kind: ArrayKind
    device: str
    arrays: Mapping[str, Sequence[Array]]
    dtypes: Mapping[str, DType]
    first: Item


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor to merge: its inputs, contiguous, the base first where there is one, and its result."""

    name: str
    inputs: tuple[Array, ...]
    out: Array


def expert_list(experts: object) -> list[object]:
    """The experts of any iterable; BackendError for what was probably meant as a single expert."""
    if not isinstance(experts, (Mapping, Set, str, bytes)) and kind_of(experts) is None:
        try:
            each = iter(experts)  # type: ignore[call-overload]
        except TypeError:
            pass
        else:
            return list(each)
    raise BackendError(
        f"experts is {what(experts)}, expected a list with a tensor, or a dict of tensors, for each expert"
    )


@collector_paused()
def read_operands(base: object | None, experts: Sequence[object]) -> Operands:
    """All inputs, checked; `base` is None where the method takes none."""
    items = [Item(f"expert {k}", expert) for k, expert in enumerate(experts)]
    if base is not None:
        items.insert(0, Item("base", base))
    sources = [_by_name(item, items[0]) for item in items]
    arrays = {name: [source[name] for source in sources] for name in sources[0]}
    roles = [item.role for item in items]
    first: tuple[Item, Facts] | None = None
    dtypes = {}
    for name, row in arrays.items():
        named = [Item(role, array, name) for role, array in zip(roles, row, strict=True)]
        facts = [_facts(item) for item in named]
        first = first or (named[0], facts[0])
        for item, found in zip(named, facts, strict=True):
            _check_place(item, found, *first)
            _check_alike(item, found, named[0], facts[0])
        dtypes[name] = promote({found.dtype for found in facts})
        if not dtypes[name].mergeable:
            _check_equal(named, facts[0].kind)
    if first is None:  # dicts without tensors are of any kind
        return Operands(NUMPY, "cpu", arrays, dtypes, items[0])
    return Operands(first[1].kind, first[1].device, arrays, dtypes, items[0])


@collector_paused()
def stacked(operands: Operands, outs: Sequence[object | None], wanted: DType | None) -> list[list[Stack]]:
    """What a backend is given, for each of `outs`: arrays for the results, built as the inputs are.

    An out of None means new ones. `wanted`: the results' float type, None for the inputs' common one;
    integers keep theirs.
    """
    kind = operands.kind
    dtypes = {
        name: wanted if wanted is not None and dtype.mergeable else dtype
        for name, dtype in operands.dtypes.items()
    }
    results = []
    for out in outs:
        if out is None:
            results.append({name: kind.empty(row[0], dtypes[name]) for name, row in operands.arrays.items()})
            continue
        results.append(dict(_by_name(Item("out", out), operands.first)))
        for name, dtype in dtypes.items():
            _check_out(Item("out", results[-1][name], name), dtype, operands)
    if any(out is not None for out in outs):
        _check_apart(operands, results)
    inputs = {name: tuple(map(kind.contiguous, row)) for name, row in operands.arrays.items()}
    return [[Stack(name, row, result[name]) for name, row in inputs.items()] for result in results]


def _by_name(item: Item, first: Item) -> Mapping[str, Any]:
    """The arrays of `item`, which must be built as the first input is; a single one has the name ""."""
    given = item.value
    if isinstance(given, Mapping) != isinstance(first.value, Mapping):
        raise BackendError(f"{item} is {what(given)}, but {first} is {what(first.value)}")
    if not isinstance(given, Mapping):
        return {"": given}
    for name in given:
        if not isinstance(name, str) or not _encodes(name):
            raise BackendError(f"{item} has a tensor named {name!r}, but names must be text")
    if given.keys() != first.value.keys():
        odd = sorted(given.keys() ^ first.value.keys())
        raise BackendError(f"{item} does not have the names of {first}; they differ in {odd[:3]}")
    return given


def _encodes(name: str) -> bool:
    """Whether `name` is whole text: the random trim hashes its UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _facts(item: Item) -> Facts:
    """BackendError for an array that no backend takes."""
    kind = kind_of(item.value)
    if kind is None:
        raise BackendError(f"{item}: expected a torch tensor or a numpy array, found {what(item.value)}")
    fault = kind.fault(item.value)
    if fault is not None:
        raise BackendError(f"{item} {fault}")
    name = dtype_name(item.value.dtype)
    dtype = BY_TORCH_NAME.get(name)
    if dtype is None or not (dtype.mergeable or dtype.copyable):
        raise BackendError(
            f"{item} has element type {name}; expected a float of 16, 32 or 64 bits, an integer or bool"
        )
    return Facts(kind, kind.device(item.value), kind.shape(item.value), dtype)


def _check_place(item: Item, found: Facts, first: Item, expected: Facts) -> None:
    if found.kind is not expected.kind:
        raise BackendError(f"{item} is a {found.kind.name}, but {first} is a {expected.kind.name}")
    if found.device != expected.device:
        raise BackendError(f"{item} lies on {found.device}, but {first} lies on {expected.device}")


def _check_alike(item: Item, found: Facts, first: Item, expected: Facts) -> None:
    if found.shape != expected.shape:
        raise BackendError(
            f"{item} has shape {found.shape}, expected {expected.shape}, the shape of {first.role}"
        )
    if found.dtype is not expected.dtype and not (found.dtype.mergeable and expected.dtype.mergeable):
        raise BackendError(
            f"{item} has element type {found.dtype.torch_name}, which does not merge with"
            f" {expected.dtype.torch_name} of {first.role}"
        )


def _check_equal(items: Sequence[Item], kind: ArrayKind) -> None:
    for item in items[1:]:
        if not kind.equal(items[0].value, item.value):
            raise BackendError(
                f"{item} differs from {items[0].role}, but tensors of integers must be equal in all inputs"
            )


def _check_out(item: Item, dtype: DType, operands: Operands) -> None:
    found, like = _facts(item), operands.arrays[item.name][0]
    expected = Facts(operands.kind, operands.device, operands.kind.shape(like), dtype)
    _check_place(item, found, operands.first, expected)
    if found != expected:
        raise BackendError(
            f"{item} must have shape {expected.shape} and element type {expected.dtype.torch_name},"
            f" found {found.shape} and {found.dtype.torch_name}"
        )
    fault = found.kind.out_fault(item.value)
    if fault is not None:
        raise BackendError(f"{item} {fault}")


def _check_apart(operands: Operands, results: Sequence[Mapping[str, Array]]) -> None:
    """Results are written while inputs are read, so `out` must not touch any input, nor itself twice."""
    bounds = operands.kind.bounds
    spans: list[tuple[int, int, Item | None]]
    spans = [(*bounds(array), None) for row in operands.arrays.values() for array in row]
    spans += [(*bounds(out), Item("out", out, name)) for outs in results for name, out in outs.items()]
    read_to, written_to, last = 0, 0, None
    for start, end, item in sorted(spans, key=itemgetter(0)):
        if start == end:
            continue
        if start < written_to if item is None else start < read_to:
            raise BackendError(
                f"{item or last} shares memory with an input, which would be overwritten while it is read"
            )
        if item is None:
            read_to = max(read_to, end)
            continue
        if start < written_to:
            raise BackendError(f"{item} shares memory with another out")
        written_to, last = end, item


def what(value: object) -> str:
    """What a caller has passed, in words."""
    kind = kind_of(value)
    if kind is not None:
        return f"a {kind.name}"
    if value is None or isinstance(value, Mapping):
        return "None" if value is None else "a dict"
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
