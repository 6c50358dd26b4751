"""Every value that exact arithmetic allows a merged element to have, in f64, and what leads to it.

Independent of the code: full sorts, all subsets of the entries whose fate is open, both sides where a sum
cancels. Where several entries of a task vector equal its threshold, mergekit may keep any of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from parity_run import Merged, Numbers

from pymerge.rule import Rule, Trim

Flags = NDArray[np.bool_]

UNIT = 2.0**-24  # half the distance from 1 to the next float32


@dataclass(frozen=True)
class Outcome:
    """One possible value for each element where `possible`.

    `size`: the base and all terms of the sum with their signs removed; `moving`: the part of it that changes
    with the factor of a rescale. `loose`: how far weights that hang on all entries may move it, relatively.
    """

    reason: str
    value: Numbers
    possible: Flags
    size: Numbers
    moving: Numbers
    loose: float = 0.0


@dataclass(frozen=True)
class Fate:
    """Which entries of one task vector take part, which do not, and for which it is open.

    `first`: what pymerge promises among the open ones. `factor`: the rescale.
    """

    kept: Flags
    open: Flags
    first: Flags
    factor: float


def summed(tensor: Merged, working: np.dtype[Any]) -> Iterator[Outcome]:
    """The possible values of every element, pymerge's own choice first; task vectors rank as `working`."""
    rule = tensor.rule
    if tensor.base is None:
        yield _averaged(tensor.experts, rule)
        return
    deltas = [x - tensor.base for x in tensor.experts]
    fates = [fate(d, k, rule, working) for k, d in enumerate(deltas)]
    chosen = [f.kept | (f.open & f.first) for f in fates]
    yield from _outcomes(tensor.base, deltas, fates, chosen, np.ones(tensor.base.shape, bool), True, rule)
    for states in itertools.product((False, True), repeat=len(fates)):
        if not any(f.open.any() for f in fates):
            return
        agree = [f.open | (f.kept == state) for f, state in zip(fates, states, strict=True)]
        possible = np.logical_and.reduce(agree)
        if possible.any():
            kept = [np.full(tensor.base.shape, state) for state in states]
            yield from _outcomes(tensor.base, deltas, fates, kept, possible, False, rule)


def fate(delta: Numbers, expert: int, rule: Rule, working: np.dtype[Any]) -> Fate:
    """What the trim makes of one task vector."""
    density, n = rule.densities[expert], delta.size
    everything, nothing = np.ones(n, bool), np.zeros(n, bool)
    if rule.trim is Trim.NONE or density >= 1:
        return Fate(everything, nothing, nothing, 1.0)
    if rule.trim.drawn:
        return Fate(nothing, everything, everything, 1 / density if rule.rescale else 1.0)
    if rule.trim is Trim.MAGNITUDE:
        low, high = max(1, int(density * n)), 0
    else:
        target = int(density * n)
        high = min(int(rule.gammas[expert] * n), n - target)
        low = high + target
        if target == 0:
            return Fate(nothing, nothing, nothing, 1.0)
    # f64 again: every working type orders like it.
    size = np.abs(delta).astype(working).astype(np.float64)
    order = np.argsort(-size, kind="stable")
    reaches, outlier = _cut(size, order, low), _cut(size, order, high)
    taken = np.zeros(n, bool)
    taken[order[high:low]] = True
    kept = reaches[0] & ~outlier[1]
    unsure = ~kept & reaches[1] & ~outlier[0]
    exact = np.abs(delta)
    before, after = math.fsum(exact), math.fsum(exact[taken])
    factor = before / after if rule.rescale and min(before, after) >= 1e-7 else 1.0
    return Fate(kept, unsure, taken, factor)


def _cut(size: Numbers, order: NDArray[np.intp], rank: int) -> tuple[Flags, Flags]:
    """Which entries are certainly, and which possibly, among the `rank` largest."""
    if rank == 0:
        nothing = np.zeros(size.size, bool)
        return nothing, nothing
    threshold = size[order[rank - 1]]
    possible = size >= threshold
    return (possible if possible.sum() == rank else size > threshold), possible


def _averaged(experts: Sequence[Numbers], rule: Rule) -> Outcome:
    terms = [x * w for x, w in zip(experts, rule.weights, strict=True)]
    divisor = math.fsum(rule.weights) if rule.normalize else 1.0
    spread = sum(map(abs, rule.weights)) / abs(divisor) if rule.normalize else 1.0
    size = sum(map(np.abs, terms), np.zeros_like(terms[0])) / abs(divisor) * max(1.0, spread)
    value = sum(terms, np.zeros_like(terms[0])) / divisor
    return Outcome("rounding", value, np.ones(value.shape, bool), size, np.zeros_like(size))


def _outcomes(
    base: Numbers,
    deltas: Sequence[Numbers],
    fates: Sequence[Fate],
    kept: Sequence[Flags],
    possible: Flags,
    ours: bool,
    rule: Rule,
) -> Iterator[Outcome]:
    """The value of one choice of kept entries, and where its sum cancels that of the other side."""
    terms = [
        np.where(keep, d * f.factor * w, 0.0)
        for d, f, keep, w in zip(deltas, fates, kept, rule.weights, strict=True)
    ]
    zero = np.zeros_like(base)
    mass, spread = sum(terms, zero), sum(map(np.abs, terms), zero)
    choice = "rounding" if ours else "random drop" if rule.trim.drawn else "equal magnitudes"
    if not rule.elect:
        divisor = np.full_like(base, math.fsum(rule.weights))
        divisor[np.abs(divisor) < 1e-8] = 1.0
        yield _finished(choice, base, terms, rule.weights, divisor, possible, rule)
        return
    # Both sides only where roundings of the terms can change the sign of their sum.
    cancels = (np.abs(mass) <= 16 * UNIT * spread) & (spread > 0)
    for other in (False, True):
        side = np.where((mass >= 0) != other, 1.0, -1.0)
        agreeing = [np.where(v * side > 0, v, 0.0) for v in terms]
        divisor = sum((np.where(v != 0, w, 0.0) for v, w in zip(agreeing, rule.weights, strict=True)), zero)
        divisor = np.where(divisor == 0, 1.0, divisor)
        where = possible & cancels if other else possible
        if where.any():
            reason = f"{choice}, sign of a sum that cancels" if other else choice
            yield _finished(reason, base, agreeing, rule.weights, divisor, where, rule)


def _finished(
    reason: str,
    base: Numbers,
    terms: Sequence[Numbers],
    weights: Sequence[float],
    divisor: Numbers,
    possible: Flags,
    rule: Rule,
) -> Outcome:
    zero = np.zeros_like(base)
    total, sizes = sum(terms, zero), sum(map(np.abs, terms), zero)
    if rule.normalize:
        spread = np.maximum(1.0, sum(map(abs, weights)) / np.abs(divisor))
        total, sizes = total / divisor, sizes / np.abs(divisor) * spread
    moving = abs(rule.lambda_) * sizes
    return Outcome(reason, base + rule.lambda_ * total, possible, np.abs(base) + moving, moving)
