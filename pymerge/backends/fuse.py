"""Fuse: the entries of one element become one by another formula than a sum; csrc/core/fuse.h in torch.

`base` and `deltas` (one task vector for each expert) are in the working type, every operation is rounded once
and sums run in the order of the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymerge.backends.sums import ordered_sum
from pymerge.rule import Fuse, Fusing, Rule

NEAREST = 1e-6  # swap: a smaller distance counts as this
LEAST_WEIGHTS = 1e-6  # energy: weights that sum to less count as this
LEAST_ENERGY = 1e-6  # energy: below this sum all experts weigh alike


def fuse_tensor(
    base: Tensor, experts: Sequence[Tensor], deltas: Sequence[Tensor], kept: Sequence[Tensor], rule: Rule
) -> Tensor:
    """One merged tensor in the working type."""
    assert rule.fuse is not None
    if rule.fuse.kind is Fuse.SWAP:
        return fuse_swap(base, experts[0], rule.fuse)
    entries = [torch.where(keep, d, 0.0) for d, keep in zip(deltas, kept, strict=True)]
    return FUSES[rule.fuse.kind](base, entries, rule, rule.fuse)


def fuse_swap(base: Tensor, x: Tensor, fuse: Fusing) -> Tensor:
    """The nearer the other model, the more of it is taken (mergekit's nearswap)."""
    distance = (x - base).abs()
    share = base.new_tensor(fuse.t) / torch.where(distance < NEAREST, base.new_tensor(NEAREST), distance)
    share = torch.where(share >= 1, 1.0, torch.where(share <= 0, 0.0, share))
    return share * x + (1.0 - share) * base


def fuse_overlap(base: Tensor, deltas: Sequence[Tensor], rule: Rule, fuse: Fusing) -> Tensor:
    """The mean of the entries past t; one alone goes whole, times its expert's factor (RAM, 2026)."""
    threshold = base.new_tensor(fuse.t)
    past = [~(d.abs() <= threshold) for d in deltas]
    count = torch.zeros_like(base)
    for keep in past:
        count = count + keep
    total, alone = torch.zeros_like(base), torch.zeros_like(base)
    for d, keep in zip(deltas, past, strict=True):
        factor = base.new_tensor(overlap_factor(keep, count, fuse))
        total = total + torch.where(keep, d, 0.0)
        alone = alone + torch.where(keep, d * factor, 0.0)
    shared = count >= 2
    return base + torch.where(shared, total / torch.where(shared, count, 1.0), alone)


def overlap_factor(past: Tensor, count: Tensor, fuse: Fusing) -> float:
    """What an expert's entries that stand alone are multiplied by, given how many others do not."""
    if fuse.boost == 0:
        return 1.0
    alone, shared = int((past & (count == 1)).sum()), int((past & (count > 1)).sum())
    share = shared / (fuse.t if alone < fuse.t else alone) if alone or fuse.t else 0.0
    return 1 + fuse.boost * min(max(share, 0.0), fuse.most_boost)


def fuse_energy(base: Tensor, deltas: Sequence[Tensor], rule: Rule, fuse: Fusing) -> Tensor:
    """The mean of what bears the sign of the sum, weighted by energy (SCE; "FuseChat", 2024, section 3.3)."""
    mass = torch.zeros_like(base)
    for d in deltas:
        mass = mass + d
    total, weights = torch.zeros_like(base), torch.zeros_like(base)
    for d, energy in zip(deltas, energy_weights(deltas), strict=True):
        weight = base.new_tensor(energy)
        agree = torch.where(mass >= 0, d > 0, d < 0)
        total = total + torch.where(agree, d * weight, 0.0)
        weights = weights + torch.where(agree, weight, 0.0)
    out = base + total / torch.where(weights < LEAST_WEIGHTS, base.new_tensor(LEAST_WEIGHTS), weights)
    return torch.where(torch.isnan(mass), torch.nan, out)


def energy_weights(deltas: Sequence[Tensor]) -> list[float]:
    """Each expert's share of the sum of mean squares, f64."""
    size = deltas[0].numel()
    squares = [d.to(torch.float64) * d.to(torch.float64) for d in deltas]
    energy = [float(ordered_sum(square)) / size if size else 0.0 for square in squares]
    total = 0.0
    for mean in energy:
        total += mean
    return [1.0 / len(deltas) if abs(total) < LEAST_ENERGY else mean / total for mean in energy]


def fuse_largest(base: Tensor, deltas: Sequence[Tensor], rule: Rule, fuse: Fusing) -> Tensor:
    """The largest entry, of equal ones the first expert's ("MagMax", 2024, section 3.2)."""
    return base + base.new_tensor(rule.lambda_) * largest(weighted(base, deltas, rule))


def fuse_elected(base: Tensor, deltas: Sequence[Tensor], rule: Rule, fuse: Fusing) -> Tensor:
    """The largest entry that bears the sign of the sum ("EMR-Merging", 2024, section 3.2)."""
    entries = weighted(base, deltas, rule)
    mass = torch.zeros_like(base)
    for entry in entries:
        mass = mass + entry
    agreeing = [torch.where(torch.where(mass >= 0, x > 0, x < 0), x, 0.0) for x in entries]
    out = base + base.new_tensor(rule.lambda_) * largest(agreeing)
    return torch.where(torch.isnan(mass), torch.nan, out)


def fuse_consensus(base: Tensor, deltas: Sequence[Tensor], rule: Rule, fuse: Fusing) -> Tensor:
    """The sum, where enough experts claim an entry: |d| >= t * |sum - d| (consensus merging, 2024)."""
    entries = weighted(base, deltas, rule)
    mass = torch.zeros_like(base)
    for entry in entries:
        mass = mass + entry
    claims = torch.zeros_like(base)
    for entry in entries:
        claims = claims + ~larger((mass - entry) * base.new_tensor(fuse.t), entry)
    out = base + base.new_tensor(rule.lambda_) * torch.where(claims >= fuse.votes, mass, 0.0)
    return torch.where(torch.isnan(mass), torch.nan, out)


def weighted(base: Tensor, deltas: Sequence[Tensor], rule: Rule) -> list[Tensor]:
    """The task vectors times their weights."""
    return [d * base.new_tensor(weight) for d, weight in zip(deltas, rule.weights, strict=True)]


def largest(entries: Sequence[Tensor]) -> Tensor:
    """The entry of largest magnitude, of equal ones the first; NaN is larger than any number."""
    best = torch.zeros_like(entries[0])
    for entry in entries:
        best = torch.where(larger(entry, best), entry, best)
    return best


def larger(a: Tensor, b: Tensor) -> Tensor:
    """Where |a| > |b|; NaN is larger than any number."""
    return (a.abs() > b.abs()) | (torch.isnan(a) & ~torch.isnan(b))


FUSES: dict[Fuse, Callable[[Tensor, Sequence[Tensor], Rule, Fusing], Tensor]] = {
    Fuse.OVERLAP: fuse_overlap,
    Fuse.ENERGY: fuse_energy,
    Fuse.LARGEST: fuse_largest,
    Fuse.ELECTED: fuse_elected,
    Fuse.CONSENSUS: fuse_consensus,
}
