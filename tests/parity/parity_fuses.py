"""The exact results of methods that are no weighted sums, in f64: from the papers and mergekit's guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from parity_run import Merged, Numbers
from parity_sums import UNIT, Flags, Outcome

from pymerge.rule import Fuse, Rule, Trim

# How far a float32 variance, and a float32 divergence of two softmaxes, lie from the exact ones.
VARIANCE = 16 * UNIT
DIVERGENCE = 4 * UNIT


def fused(tensor: Merged) -> Iterator[Outcome]:
    """The possible values of every element, pymerge's own choice first."""
    assert tensor.base is not None
    deltas = [x - tensor.base for x in tensor.experts]
    if tensor.rule.trim is Trim.IMPORTANCE:
        yield from _important(tensor, tensor.base, deltas[0])
    elif tensor.rule.trim is Trim.VARIANCE:
        yield from _energetic(tensor.base, deltas, tensor.rule)
    elif tensor.rule.fuse is not None and tensor.rule.fuse.kind is Fuse.SWAP:
        yield _swapped(tensor.base, tensor.experts[0], tensor.rule.fuse.t)
    else:
        yield _overlapping(tensor.base, deltas, tensor.rule)


def _outcome(
    reason: str,
    base: Numbers,
    moves: Sequence[Numbers],
    possible: Flags | None = None,
    loose: float = 0.0,
) -> Outcome:
    """The base plus `moves`."""
    zero = np.zeros_like(base)
    moving = sum(map(np.abs, moves), zero)
    where = np.ones(base.shape, bool) if possible is None else possible
    return Outcome(reason, base + sum(moves, zero), where, np.abs(base) + moving, moving, loose)


def _swapped(base: Numbers, x: Numbers, t: float) -> Outcome:
    share = np.clip(t / np.maximum(np.abs(x - base), 1e-6), 0, 1)
    value = share * x + (1 - share) * base
    # 1 - share is rounded as a number near 1.
    size = np.abs(share * x) + np.abs(base)
    return Outcome("rounding", value, np.ones(base.shape, bool), size, np.zeros_like(base))


def _overlapping(base: Numbers, deltas: Sequence[Numbers], rule: Rule) -> Outcome:
    """RAM: entries past the threshold, averaged where several are, else raised."""
    assert rule.fuse is not None
    past = [np.abs(d) > np.float64(np.float32(rule.fuse.t)) for d in deltas]
    count = np.sum(past, axis=0)
    moves = []
    for d, own in zip(deltas, past, strict=True):
        alone, shared = int((own & (count == 1)).sum()), int((own & (count > 1)).sum())
        raised = np.clip(shared / max(alone, rule.fuse.t), 0, rule.fuse.most_boost)
        factor = np.where(count > 1, 1 / np.maximum(count, 1), 1 + rule.fuse.boost * raised)
        moves.append(np.where(own, d * factor, 0.0))
    return _outcome("rounding", base, moves)


def _energetic(base: Numbers, deltas: Sequence[Numbers], rule: Rule) -> Iterator[Outcome]:
    """SCE: of the entries that vary most what agrees with the sum, weighted by mean squares."""
    stack = np.stack(deltas)
    spread, square = stack.var(axis=0), (stack**2).mean(axis=0)
    keep, unsure = np.ones(base.shape, bool), np.zeros(base.shape, bool)
    if rule.densities[0] < 1:
        rank = int(np.count_nonzero(spread) * rule.densities[0])
        order = np.argsort(-spread, kind="stable")
        keep = np.zeros(base.shape, bool)
        keep[order[:rank]] = True
        near = np.abs(spread - spread[order[rank - 1]]) <= VARIANCE * (square + spread[order[rank - 1]])
        unsure = near if rank else unsure
    energy = (np.where(keep, stack, 0.0) ** 2).mean(axis=1)
    total = energy.sum()
    weights = energy / total if total >= 1e-6 else np.full(len(deltas), 1 / len(deltas))
    # Which of the entries are kept whose variances are equal moves the energies too.
    loose = float(2 * len(deltas) * (np.where(unsure, stack, 0.0) ** 2).mean(axis=1).sum() / max(total, 1e-6))
    mass = stack.sum(axis=0)
    cancels = (np.abs(mass) <= 16 * UNIT * np.abs(stack).sum(axis=0)) & stack.any(axis=0)
    for other in (False, True):
        side = np.where((mass >= 0) != other, 1.0, -1.0)
        agree = stack * side > 0
        divisor = np.maximum((agree * weights[:, None]).sum(axis=0), 1e-6)
        moves = list(agree * stack * weights[:, None] / divisor)
        sign = ", sign of a sum that cancels" if other else ""
        possible = cancels if other else np.ones(base.shape, bool)
        yield _outcome(f"rounding{sign}", base, moves, possible & keep, loose)
        yield _outcome(f"equal variances{sign}", base, moves, possible & unsure & ~keep, loose)
    zero = [np.zeros_like(base)]
    yield _outcome("rounding", base, zero, ~keep)
    yield _outcome("equal variances", base, zero, unsure & keep)


def _important(tensor: Merged, base: Numbers, delta: Numbers) -> Iterator[Outcome]:
    """Arcee's fusion: the entries whose importance reaches the median plus 1.5 interquartile ranges."""
    rows = [x.reshape(-1, tensor.ours.shape[-1]) for x in (tensor.experts[0], base)]
    p, q = (_softmax(x) + 1e-8 for x in rows)
    moved = (p * np.log(p / q)).sum(axis=1)[:, None]
    size = np.abs(delta).reshape(rows[0].shape)
    exact, low, high = (
        (size * np.maximum(moved + off, 0.0)).ravel() for off in (0.0, -DIVERGENCE, DIVERGENCE)
    )
    keep = exact >= _fence(exact)
    # A fence between the quartiles of the least and the greatest importances.
    lowest = _quartile(low, 2) + 1.5 * max(0.0, _quartile(low, 3) - _quartile(high, 1))
    highest = _quartile(high, 2) + 1.5 * (_quartile(high, 3) - _quartile(low, 1))
    unsure = (high >= lowest) & (low <= highest)
    yield _outcome("rounding", base, [np.where(keep, delta, 0.0)])
    yield _outcome("a divergence too small for float32", base, [np.where(keep, 0.0, delta)], unsure)


def _softmax(x: Numbers) -> Numbers:
    raised = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _fence(scores: Numbers) -> float:
    return _quartile(scores, 2) + 1.5 * (_quartile(scores, 3) - _quartile(scores, 1))


def _quartile(scores: Numbers, number: int) -> float:
    return float(np.sort(scores)[(scores.size - 1) * number // 4])
