"""Ranks and scores that trims go by, in torch; core/rank.h, core/softmax.h and cpu/score.h have them in C++.

Scores and magnitudes come as integers that order like the numbers they are the bits of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.backends.sums import ordered_sum

# exp and log of our own: sums, products and bits that every processor and library gives alike.
LOG2E = 1.4426950408889634
LOG2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
LOG2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
LOG2 = 0.6931471805599453
SHIFT = float.fromhex("0x1.8p52")  # added and taken away, it rounds to a whole number
SHIFT_BITS = 0x4338000000000000
HALF_ROOT = 0x3FE6A09E667F3BCD  # sqrt(1/2): mantissas run from there to sqrt(2)
LEAST_EXPONENT = -700.0
EXP_TERMS = tuple(
    1.0 / n for n in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1)
)
LOG_TERMS = tuple(1.0 / n for n in range(19, 0, -2))
EPS = 1e-8  # added to each probability


def first_largest(magnitudes: Tensor, k: int) -> Tensor:
    """The mask of the k largest magnitudes, of equal ones the lowest index first."""
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[torch.sort(magnitudes, descending=True, stable=True)[1][:k]] = True
    return mask


def ranked_limits(magnitudes: Tensor, row: int, density: float, epsilon: float) -> Tensor:
    """What the random word of each entry must be below, i64: density and epsilon by the rank in its row.

    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling" (2024), 3.1.
    """
    if magnitudes.numel() == 0:
        return magnitudes.to(torch.int64)
    rows = magnitudes.view(-1, row)
    order = torch.sort(rows, dim=1, descending=True, stable=True)[1]
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(row - 1, -1, -1, device=order.device).expand_as(order))
    place = (
        ranks.to(torch.float64) / (row - 1) if row > 1 else torch.full_like(ranks, 0.5, dtype=torch.float64)
    )
    shares = (density - epsilon) + (2 * epsilon) * place
    return (shares * 4294967296.0).clamp(0, 4294967295).to(torch.int64).view(-1)


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """The variance over the experts of each entry, divided by their number."""
    mean = torch.zeros_like(deltas[0])
    for d in deltas:
        mean = mean + d
    mean = mean / len(deltas)
    spread = torch.zeros_like(mean)
    for d in deltas:
        spread = spread + (d - mean) * (d - mean)
    return spread / len(deltas)


def keep_variance(scores: Tensor, density: float) -> Tensor:
    """The mask of the int(density * n) largest scores, n counting those that are not zero."""
    return first_largest(scores, int(max(density, 0.0) * int((scores != 0).sum())))


def importance(base: Tensor, x: Tensor, d: Tensor, row: int) -> Tensor:
    """|d| times how far its row's softmax has moved from the base's."""
    if d.numel() == 0:
        return d
    moved = divergence(base.view(-1, row).to(torch.float64), x.view(-1, row).to(torch.float64)).to(d.dtype)
    return (d.abs().view(-1, row) * moved[:, None]).view(-1)


def keep_fence(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of the scores that reach the median plus 1.5 interquartile ranges."""
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ascending = torch.sort(scores)[0].view(dtype)
    lower, median, upper = (ascending[(scores.numel() - 1) * quarter // 4] for quarter in (1, 2, 3))
    fence = median + 1.5 * (upper - lower)
    return torch.isnan(scores.view(dtype)) | (scores.view(dtype) >= fence)


def divergence(base: Tensor, x: Tensor) -> Tensor:
    """Kullback and Leibler's divergence of softmax(x) from softmax(base), f64, for each row; at least 0."""
    over_x, over_base = exponentials(x), exponentials(base)
    p = over_x / ordered_sum(over_x)[:, None] + EPS
    q = over_base / ordered_sum(over_base)[:, None] + EPS
    total = ordered_sum(p * log(p / q))
    return torch.where(total < 0, 0.0, total)


def exponentials(x: Tensor) -> Tensor:
    """exp(x - the largest of its row); a NaN makes its row NaN."""
    most = torch.where(torch.isnan(x).any(dim=1), torch.nan, x.amax(dim=1))
    return exp(x - most[:, None])


def exp(x: Tensor) -> Tensor:
    """exp of f64 numbers that are not positive; below -700 as at -700."""
    at = torch.where(x < LEAST_EXPONENT, LEAST_EXPONENT, x)
    shifted = at * LOG2E + SHIFT
    turns = shifted - SHIFT
    r = (at - turns * LOG2_HIGH) - turns * LOG2_LOW
    total = torch.full_like(at, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        total = total * r + term
    scaled = (total.view(torch.int64) + (shifted.view(torch.int64) << 52)).view(torch.float64)
    return torch.where(torch.isnan(at), at, scaled)


def log(x: Tensor) -> Tensor:
    """log of positive normal f64 numbers."""
    bits = x.view(torch.int64)
    turns = (bits - HALF_ROOT) >> 52
    mantissa = (bits - (turns << 52)).view(torch.float64)
    whole = (turns + SHIFT_BITS).view(torch.float64) - SHIFT
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    total = torch.full_like(x, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        total = total * z + term
    return torch.where(torch.isnan(x), x, whole * LOG2 + (s + s) * total)
