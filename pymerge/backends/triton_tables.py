"""The tables that triton kernels read: which tensors there are, in which groups, cut into which pieces.

Their columns are explained in kernels/pieces.py. They are put together on the host and sent once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from pymerge.backends.philox import keep_below, tensor_key
from pymerge.errors import BackendError
from pymerge.rule import Rule, Trim

# The element types that kernels know; a kind is a place in this list.
TYPES = ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16), (torch.float32, tl.float32))
KINDS = {dtype: kind for kind, (dtype, _) in enumerate(TYPES)}
ALIGNMENT = 16
# Threads of a program that maps, whatever the width of a warp.
THREADS = 128
# Pieces are at least this many, if that leaves each a block: enough to occupy every processor evenly.
MANY_PIECES = 4096
MOST_STEPS = 64

Integers = NDArray[np.int64]


def elements_per_thread(itemsize: int, experts: int) -> int:
    """16 bytes of each input; fewer where so many experts would not fit in a thread's registers."""
    per = 16 // itemsize
    while per > 1 and per * experts > 64:
        per //= 2
    # On sm_100 two f32 of each of 32 experts spill 104 bytes, and one none.
    return 1 if itemsize == 4 and experts > 24 else per


@dataclass(frozen=True)
class Member:
    """One tensor to merge: contiguous, flat, of one element type; `base` None where the method has none."""

    name: str
    base: Tensor | None
    experts: Sequence[Tensor]
    out: Tensor

    @property
    def size(self) -> int:
        return int(self.out.numel())

    def addresses(self) -> list[int]:
        base = 0 if self.base is None else int(self.base.data_ptr())
        return [base, *(x.data_ptr() for x in self.experts), self.out.data_ptr()]


def prepared(name: str, base: Tensor | None, experts: Sequence[Tensor], out: Tensor) -> Member:
    """The tensor as kernels take it: flat, its inputs of one type (mixed ones become f32, which is exact)."""
    inputs = [*experts, *([] if base is None else [base])]
    for x in (*inputs, out):
        if x.dtype not in KINDS:
            raise BackendError(
                f"tensor {name!r}: the triton backend computes in float32 and takes no {x.dtype};"
                " expected bfloat16, float16 or float32"
            )
    if len({x.dtype for x in inputs}) > 1:
        inputs = [x.float() for x in inputs]
    flat = [x.reshape(-1) for x in inputs]
    return Member(name, None if base is None else flat.pop(), flat, out.view(-1))


@dataclass(frozen=True)
class Launch:
    """The pieces that one specialisation of a kernel takes."""

    kind: int
    out_kind: int
    ragged: bool
    numbers: Integers


@dataclass(frozen=True)
class Pieces:
    """Runs of elements in flat order. `begins` (G + 1): the first piece of every group."""

    rows: Integers
    begins: Integers
    launches: list[Launch]
    marks: int

    def __len__(self) -> int:
        return len(self.rows)


def cut_pieces(
    sizes: Integers,
    groups: Integers,
    origins: Integers,
    aligned: NDArray[np.bool_],
    kinds: Integers,
    block: int,
    steps: int,
) -> Pieces:
    """Cuts tensors, given in flat order, into pieces of at most `steps` blocks.

    The whole blocks of aligned tensors come in pieces of their own, so that the rest alone pays for masks.
    """
    whole = np.where(aligned, sizes // block * block, 0)
    lengths = np.stack([whole, sizes - whole], 1).reshape(-1)
    numbers = -(-lengths // (block * steps))
    segment = np.repeat(np.arange(lengths.size), numbers)
    within = np.arange(segment.size) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    tensor, ragged = segment // 2, segment % 2 == 1
    at = within * block * steps
    first = at + np.where(ragged, whole[tensor], 0)
    count = np.minimum(block * steps, lengths[segment] - at)
    bytes_ = -(-count // block) * (block // 8)
    rows = np.stack(
        [tensor, first, count, groups[tensor], origins[tensor] + first, np.cumsum(bytes_) - bytes_], 1
    ).astype(np.int64)
    begins = np.searchsorted(rows[:, 3], np.arange(int(groups[-1]) + 2 if groups.size else 1))
    classes = np.concatenate([kinds[tensor], ragged[:, None]], 1)
    launches = [
        Launch(int(kind), int(out), bool(odd), np.flatnonzero((classes == (kind, out, odd)).all(1)))
        for kind, out, odd in np.unique(classes, axis=0)
    ]
    return Pieces(rows, begins.astype(np.int64), launches, int(bytes_.sum()))


@dataclass
class Wave:
    """Groups that are merged together, and their tables on the device. Members stand in flat order."""

    members: list[Member]
    groups: Integers
    rule: Rule
    block: int
    sizes: Integers = field(init=False)
    origins: Integers = field(init=False)
    group_sizes: Integers = field(init=False)
    pieces: Pieces = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.members[0].out.device
        self.sizes = np.array([member.size for member in self.members], np.int64)
        ends = np.cumsum(self.sizes)
        first = np.searchsorted(self.groups, np.arange(self.groups[-1] + 1))
        begins = ends - self.sizes
        self.origins = begins - begins[first][self.groups]
        self.group_sizes = np.add.reduceat(self.sizes, first)
        self.group_begins = begins[first]
        addresses = np.array([member.addresses() for member in self.members], np.int64)
        kinds = np.array([[KINDS[m.experts[0].dtype], KINDS[m.out.dtype]] for m in self.members], np.int64)
        steps = int(np.clip(self.sizes.sum() // (MANY_PIECES * self.block), 1, MOST_STEPS))
        aligned = (addresses % ALIGNMENT == 0).all(1)
        self.pieces = cut_pieces(self.sizes, self.groups, self.origins, aligned, kinds, self.block, steps)
        self.kinds_used = sorted(set(kinds[:, 0].tolist()))
        self.out_kinds_used = sorted(set(kinds[:, 1].tolist()))
        self.addresses_on = self.send(addresses)
        self.sizes_on = self.send(self.sizes)
        self.origins_on = self.send(self.origins)
        self.kinds_on = self.send(kinds)
        self.pieces_on = self.send(self.pieces.rows)
        self.begins_on = self.send(self.pieces.begins)
        self.launched = [self.send(launch.numbers) for launch in self.pieces.launches]
        self.keys_on = self.send(
            np.array([tensor_key(self.rule.seed, m.name) for m in self.members], np.int64)
        )
        self.limits_on = self.send(
            np.array([1 << 32 if d >= 1 else keep_below(max(d, 0.0)) for d in self.rule.densities], np.int64)
        )
        self.numbers_on = self.send(self._numbers())

    @property
    def experts(self) -> int:
        return len(self.rule.weights)

    def send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _numbers(self) -> NDArray[np.float32]:
        """Weights, lambda, divisor, late weights, and a scale of 1 for every tensor and expert."""
        weights = np.array(self.rule.weights, np.float32)
        total = np.float32(0)
        for weight in weights:
            total = total + weight
        if self.rule.task_vector and abs(total) < np.float32(1e-8):
            total = np.float32(1)
        scales = np.ones(len(self.members) * self.experts, np.float32)
        late = np.array(self.rule.late_weights or [1] * self.experts, np.float32)
        return np.concatenate([weights, np.array([self.rule.lambda_, total], np.float32), late, scales])

    def scales_on(self) -> Tensor:
        """The scales, (T, K), where kernels read them."""
        return self.numbers_on[2 * self.experts + 2 :].view(len(self.members), self.experts)

    def ranks(self) -> list[Integers]:
        """How many entries of each group reach each expert's threshold, (G, K); -1: all, no trim.

        Where outliers are dropped, a second table says how many of these they are.
        """
        rule = self.rule
        size = self.group_sizes[:, None]
        n = size.astype(np.float64)
        densities = np.array(rule.densities, np.float64)[None, :]
        kept, whole = (densities * n).astype(np.int64), densities >= 1
        if rule.trim is not Trim.OUTLIERS:
            kept = np.where((densities <= 0) | (n == 0), 0, np.maximum(kept, 1))
            return [np.where(whole, -1, kept)]
        outliers, spare = (np.array(rule.gammas)[None, :] * n).astype(np.int64), size - kept
        none = (densities <= 0) | (kept == 0)
        reached = np.where(none, 0, np.where(outliers < spare, outliers + kept, -1))
        dropped = np.where(none | whole, 0, np.minimum(outliers, spare))
        return [np.where(whole, -1, reached), dropped]
