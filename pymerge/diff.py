"""How far two checkpoints are apart, tensor by tensor: in units in the last place and in value."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.index import Checkpoint, open_checkpoint
from pymerge.dtypes import DType
from pymerge.errors import CheckpointError
from pymerge.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

LISTED = 20
TILE = 1 << 20  # elements; keeps the temporaries of numpy within a few tens of megabytes


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that differs.

    `ulp`: None where the types differ or are no floats. `absolute`: None where it is NaN or has no meaning.
    """

    name: str
    elements: int
    different: int
    ulp: int | None
    absolute: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two checkpoints compared: bits decide what is different."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[TensorDifference, ...]
    compared: int
    elements: int

    @property
    def largest_ulp(self) -> TensorDifference | None:
        """The tensor with the largest distance in units in the last place."""
        return max((t for t in self.tensors if t.ulp), key=lambda t: t.ulp or 0, default=None)

    @property
    def largest_absolute(self) -> TensorDifference | None:
        """The tensor with the largest difference in value."""
        return max((t for t in self.tensors if t.absolute), key=lambda t: t.absolute or 0.0, default=None)

    @property
    def is_equal(self) -> bool:
        """Same names, same shapes and types, same bits."""
        return not (self.only_a or self.only_b or self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        largest = {"largest_ulp": self.largest_ulp, "largest_absolute": self.largest_absolute}
        names = {key: far.name if far else None for key, far in largest.items()}
        return {**asdict(self), **names, "equal": self.is_equal}


def diff(a: Path, b: Path) -> Difference:
    """Compare two checkpoints (folders or files) in tiles of bounded memory. Raises PymergeError."""
    first, second = open_checkpoint(a), open_checkpoint(b)
    shared = [name for name in first.tensors if name in second.tensors]
    with ExitStack() as stack:
        files_a, files_b = (_open(checkpoint, stack) for checkpoint in (first, second))
        found = []
        elements = 0
        for name in shared:
            one, other = first.tensors[name], second.tensors[name]
            elements += one.entry.count
            place_a = _Place(first.shards[one.shard].path, files_a[one.shard], one.entry)
            place_b = _Place(second.shards[other.shard].path, files_b[other.shard], other.entry)
            difference = _compare(name, place_a, place_b)
            if difference.different or difference.note:
                found.append(difference)
    return Difference(
        only_a=tuple(name for name in first.tensors if name not in second.tensors),
        only_b=tuple(name for name in second.tensors if name not in first.tensors),
        tensors=tuple(found),
        compared=len(shared),
        elements=elements,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    fd: int
    entry: TensorEntry


def _open(checkpoint: Checkpoint, stack: ExitStack) -> list[int]:
    fds = []
    for shard in checkpoint.shards:
        fds.append(open_regular(shard.path))
        stack.callback(os.close, fds[-1])
    return fds


def _compare(name: str, a: _Place, b: _Place) -> TensorDifference:
    count = a.entry.count
    if a.entry.shape != b.entry.shape:
        note = f"shape {list(a.entry.shape)} against {list(b.entry.shape)}"
        return TensorDifference(name, count, max(count, b.entry.count), None, None, note)
    same_type = a.entry.dtype is b.entry.dtype
    if not same_type:
        note = f"{a.entry.dtype.header_name} against {b.entry.dtype.header_name}"
        if not (a.entry.dtype.mergeable and b.entry.dtype.mergeable):
            return TensorDifference(name, count, count, None, None, note)
    else:
        note = ""
    different, ulp, absolute = 0, 0, 0.0
    for tile_a, tile_b in _tiles(a, b):
        if same_type and np.array_equal(tile_a, tile_b):
            continue
        apart = _apart(tile_a, tile_b, a.entry.dtype, b.entry.dtype)
        different += apart[0]
        ulp = max(ulp, apart[1])
        absolute = float(np.maximum(absolute, apart[2]))  # NaN stays
    dtype = a.entry.dtype
    has_ulp = same_type and dtype.mergeable
    has_values = bool(np.isfinite(absolute)) and (dtype.mergeable or dtype.copyable)
    return TensorDifference(
        name, count, different, ulp if has_ulp else None, absolute if has_values else None, note
    )


def _tiles(a: _Place, b: _Place) -> Iterator[tuple[Array, Array]]:
    for start in range(0, a.entry.count, TILE):
        count = min(TILE, a.entry.count - start)
        yield _read(a, start, count), _read(b, start, count)


def _read(place: _Place, start: int, count: int) -> Array:
    """The bits of some elements as unsigned integers (bytes for types that are not whole bytes)."""
    bits = place.entry.dtype.bits
    if bits % 8:
        raise CheckpointError(f"{place.path} holds {place.entry.dtype.header_name}, which has no bytes")
    data = np.empty(count * bits // 8, dtype=np.uint8)
    view, offset = data.data, place.entry.begin + start * (bits // 8)
    while view:
        got = os.preadv(place.fd, [view], offset)
        if got == 0:
            raise CheckpointError(f"{place.path} is truncated at byte {offset:,}")
        view, offset = view[got:], offset + got
    return data.view(f"u{bits // 8}")


def _apart(a: Array, b: Array, dtype_a: DType, dtype_b: DType) -> tuple[int, int, float]:
    """(different elements, largest ulp distance, largest absolute difference) of two tiles of bits."""
    where = np.ones(a.shape, bool) if dtype_a is not dtype_b else a != b
    a, b = a[where], b[where]
    values_a, values_b = _values(a, dtype_a), _values(b, dtype_b)
    ulp = 0
    if dtype_a is not dtype_b:
        unequal = (values_a != values_b) & ~(np.isnan(values_a) & np.isnan(values_b))
        different = int(np.count_nonzero(unequal))
    else:
        different = int(np.count_nonzero(where))
        if dtype_a.mergeable and different:
            ulp = max(abs(int(x) - int(y)) for x, y in _extremes(_ordered(a), _ordered(b)))
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(values_a - values_b)
    gaps[values_a == values_b] = 0.0  # inf against inf
    return different, ulp, float(gaps.max(initial=0.0))


def _extremes(a: Array, b: Array) -> list[tuple[Any, Any]]:
    """The pairs with the largest distance in either direction; int64 differences of f64 may not fit."""
    distance = a.astype(np.float64) - b.astype(np.float64) if a.dtype.itemsize == 8 else a - b
    return [(a[i], b[i]) for i in (int(distance.argmax()), int(distance.argmin()))]


def _ordered(bits: Array) -> Array:
    """Float bits as integers in the order of the values; neighbours are 1 apart, -0 lies just below +0."""
    width = bits.dtype.itemsize * 8
    signed = bits.astype(np.int64) if width < 64 else bits.view(np.int64)
    if width == 64:
        return np.where(signed < 0, ~(signed & np.int64(2**63 - 1)), signed)
    sign = np.int64(1) << np.int64(width - 1)
    return np.where(signed & sign, ~(signed & (sign - 1)), signed)


def _values(bits: Array, dtype: DType) -> Array:
    """The numbers behind bits, in float64."""
    if dtype is DType.BF16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if dtype.mergeable:
        return bits.view(dtype.torch_name).astype(np.float64)
    if dtype.copyable and dtype is not DType.BOOL:
        return bits.view(dtype.torch_name).astype(np.float64)
    return bits.astype(np.float64)


def describe(difference: Difference, everything: bool = False) -> str:
    """The names that only one has and the tensors that differ, worst first (20 of a kind, or everything)."""
    lines = _listed([f"only in A: {name!r}" for name in difference.only_a], everything)
    lines += _listed([f"only in B: {name!r}" for name in difference.only_b], everything)
    if difference.tensors:
        lines.append(f"{'different':>14} {'of':>14} {'max ulp':>12} {'max difference':>15}  tensor")
    lines += _listed([_row(tensor) for tensor in sorted(difference.tensors, key=_badness)], everything)
    unequal = len(difference.tensors)
    lines.append(
        f"{difference.compared:,} tensors compared ({difference.elements:,} elements):"
        f" {difference.compared - unequal:,} equal bit for bit, {unequal:,} different;"
        f" {len(difference.only_a):,} only in A, {len(difference.only_b):,} only in B"
    )
    if (far := difference.largest_ulp) is not None:
        lines.append(f"largest distance: {far.ulp:,} units in the last place, in {far.name!r}")
    if (far := difference.largest_absolute) is not None:
        lines.append(f"largest difference: {far.absolute:.6g}, in {far.name!r}")
    return "\n".join(lines)


def _listed(lines: list[str], everything: bool) -> list[str]:
    more = len(lines) - LISTED
    return (
        lines if everything or more <= 0 else [*lines[:LISTED], f"... and {more:,} more (--all lists them)"]
    )


def _row(tensor: TensorDifference) -> str:
    ulp = "-" if tensor.ulp is None else f"{tensor.ulp:,}"
    absolute = "-" if tensor.absolute is None else f"{tensor.absolute:.6g}"
    note = f" ({tensor.note})" if tensor.note else ""
    return f"{tensor.different:>14,} {tensor.elements:>14,} {ulp:>12} {absolute:>15}  {tensor.name!r}{note}"


def _badness(tensor: TensorDifference) -> tuple[bool, int, float]:
    """Sorts the worst first: what cannot be compared at all, then by the distance."""
    comparable = tensor.ulp is not None or tensor.absolute is not None
    return comparable, -(tensor.ulp or 0), -(tensor.absolute or 0.0)
