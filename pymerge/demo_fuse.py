"""The demo's second opinion on ranks, scores and fuses: the definitions once more, in plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

EPSILON = 0.15  # of della, by default
NOISE = np.float32(1e-5)  # of ram, by default
RAISE, MOST_RAISE = 0.1, 0.2  # of ramplus_tl, by default
CLAIM, VOTES = np.float32(0.4), 2  # of consensus, by default


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor in the base, in each expert, and in each expert less the base; `row`: a row's size."""

    base: F32
    experts: Sequence[F32]
    deltas: Sequence[F32]
    row: int


def ranked_limits(delta: F32, row: int, density: float) -> NDArray[np.uint64]:
    """What each entry's random word must be below: more for what is large in its row."""
    sizes = np.abs(delta).reshape(-1, row)
    ascending = np.argsort(
        sizes[:, ::-1], axis=1, kind="stable"
    )  # backwards: of equal ones the first is largest
    ranks = np.empty_like(ascending)
    np.put_along_axis(ranks, ascending, np.broadcast_to(np.arange(row), ascending.shape), axis=1)
    ranks = ranks[:, ::-1]
    shares = (density - EPSILON) + (2 * EPSILON) * (ranks / (row - 1))
    limits: NDArray[np.uint64] = np.floor(shares * 2**32).astype(np.uint64).reshape(-1)
    return limits


def fused(method: str, t: float, weights: Sequence[float], lambda_: float, stack: Stack) -> F32:
    """The merged tensor in f32. `t`: of nearswap; the share of entries that sce selects."""
    base, deltas = stack.base, stack.deltas
    if method == "nearswap":
        other = stack.experts[0]
        near = np.clip(np.float32(t) / np.maximum(np.abs(other - base), np.float32(1e-6)), 0, 1)
        return np.asarray(near * other + (np.float32(1) - near) * base)
    if method == "arcee_fusion":
        return base + np.where(_stands_out(stack), deltas[0], np.float32(0))
    if method in ("ram", "ramplus_tl"):
        return base + _overlapping(method == "ramplus_tl", deltas)
    if method == "sce":
        return base + _by_energy(deltas, t)
    entries = [d * np.float32(w) for d, w in zip(deltas, weights, strict=True)]
    return base + np.float32(lambda_) * _chosen(method, entries)


def _sum(values: Sequence[F32]) -> F32:
    total = np.zeros_like(values[0])
    for value in values:
        total += value
    return total


def _chosen(method: str, entries: Sequence[F32]) -> F32:
    total = _sum(entries)
    if method == "consensus":
        claims = sum((np.abs((total - x) * CLAIM) <= np.abs(x)).astype(np.int64) for x in entries)
        return np.where(claims >= VOTES, total, np.float32(0))
    kept = entries
    if method == "emr":
        kept = [np.where(np.where(total >= 0, x > 0, x < 0), x, np.float32(0)) for x in entries]
    stacked = np.stack(kept)
    first = np.argmax(np.abs(stacked), axis=0)
    return np.asarray(np.take_along_axis(stacked, first[None], axis=0)[0])


def _overlapping(raised: bool, deltas: Sequence[F32]) -> F32:
    past = [np.abs(d) > NOISE for d in deltas]
    count = sum(p.astype(np.int64) for p in past)
    kept = [np.where(p, d, np.float32(0)) for p, d in zip(past, deltas, strict=True)]
    factors = [np.float32(1)] * len(deltas)
    if raised:
        for k, p in enumerate(past):
            alone, shared = np.count_nonzero(p & (count == 1)), np.count_nonzero(p & (count > 1))
            share = shared / max(float(alone), 1e-5)
            factors[k] = np.float32(1 + RAISE * min(share, MOST_RAISE))
    alone_part = _sum([x * f for x, f in zip(kept, factors, strict=True)])
    divisor = np.maximum(count, 1).astype(np.float32)
    return np.asarray(np.where(count > 1, _sum(kept) / divisor, alone_part))


def _by_energy(deltas: Sequence[F32], topk: float) -> F32:
    """SCE: select by variance, weigh by mean square, average what has the sign of the sum."""
    number = np.float32(len(deltas))
    mean = _sum(deltas) / number
    spread = _sum([(d - mean) * (d - mean) for d in deltas]) / number
    kept = int(topk * np.count_nonzero(spread))
    mask = np.zeros(spread.size, dtype=np.bool_)
    mask[np.argsort(-spread, kind="stable")[:kept]] = True
    entries = [np.where(mask, d, np.float32(0)) for d in deltas]
    energy = [float(np.mean(np.square(x.astype(np.float64)))) for x in entries]
    total = sum(energy)
    shares = [np.float32(e / total if total >= 1e-6 else 1 / len(deltas)) for e in energy]
    positive = _sum(entries) >= 0
    agree = [np.where(positive, x > 0, x < 0) for x in entries]
    weight = _sum([np.where(a, s, np.float32(0)) for a, s in zip(agree, shares, strict=True)])
    value = _sum([np.where(a, x * s, np.float32(0)) for a, x, s in zip(agree, entries, shares, strict=True)])
    return np.asarray(value / np.maximum(weight, np.float32(1e-6)), dtype=np.float32)


def _stands_out(stack: Stack) -> Mask:
    """Where |delta| times its row's divergence lies above the fence of 1.5 interquartile ranges."""
    p, q = (_softmax(x.reshape(-1, stack.row)) + 1e-8 for x in (stack.experts[0], stack.base))
    moved = np.maximum((p * np.log(p / q)).sum(axis=1), 0).astype(np.float32)
    scores = (np.abs(stack.deltas[0]).reshape(-1, stack.row) * moved[:, None]).reshape(-1)
    ascending = np.sort(scores)
    lower, median, upper = (ascending[(scores.size - 1) * quarter // 4] for quarter in (1, 2, 3))
    mask: Mask = scores >= median + np.float32(1.5) * (upper - lower)
    return mask


def _softmax(x: F32) -> F64:
    wide = x.astype(np.float64)
    over = np.exp(wide - wide.max(axis=1, keepdims=True))
    return np.asarray(over / over.sum(axis=1, keepdims=True))
