"""Device memory of the Triton backend: how much it takes, and taking it before the first result is written.

Small tables are made between the kernels, by torch. So that none of them finds the device full when results
are half written, as much as all of them need is taken once before, and given back to torch's allocator, which
keeps it for this process and stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymerge.backends import sums
from pymerge.backends.triton_search import BINS, CLUSTER, sample_sizes
from pymerge.backends.triton_tables import MANY_PIECES, MOST_STEPS, Integers, Wave
from pymerge.rule import Rule, Scope, Trim

# Tensors whose cuts one program finds, held in its registers.
SMALL = 16384
# Searches (groups times experts) of one wave: the tables of digits take 16 KiB each.
MOST_SEARCHES = 2048
# Elements from which a group is sampled and streamed, and of the steps that pieces are cut into.
ONE_PASS_FROM, BLOCK = 1 << 20, 1024
SIGMAS = 4.0
# torch's allocator serves requests of up to 1 MiB from segments of their own, each of 2 MiB.
SMALL_REQUEST, SMALL_REQUESTS = 1 << 20, 8
ROUNDING = 1 << 18  # some hundred tables, each rounded up to 512 bytes
WORD = 8


def room_for(group_sizes: Integers, experts: int, sigmas: float, capacity: int | None = None) -> Integers:
    """Rows for the undecided of each group: twice what a bracket leaves at densities where it is widest."""
    if capacity is not None:
        room = np.full_like(group_sizes, capacity)
    else:
        expected = experts * group_sizes * (1.25 * sigmas) / np.sqrt(sample_sizes(group_sizes))
        room = np.minimum(group_sizes, 2 * expected.astype(np.int64) + 1024)
    return np.asarray((room + 15) // 16 * 16, np.int64)


def cuts_of(rule: Rule) -> int:
    """How many cuts a group has: one for each expert, or two where outliers are dropped."""
    return len(rule.weights) * (2 if rule.trim is Trim.OUTLIERS else 1)


@dataclass(frozen=True)
class Extent:
    """How large a wave is: tensors, groups and pieces; rows are those gathered at once, samples included."""

    tensors: int
    groups: int
    pieces: int
    rows: int = 0
    samples: int = 0

    @classmethod
    def of(cls, wave: Wave, rows: int = 0, samples: int = 0) -> Extent:
        return cls(len(wave.members), len(wave.group_sizes), len(wave.pieces), rows, samples)

    def lasting(self, experts: int) -> int:
        """Bytes of the tables that a wave keeps."""
        return WORD * (self.tensors * (2 * experts + 12) + 8 * self.pieces + self.groups) + ROUNDING

    def passing(self, cuts: int) -> int:
        """Bytes, at most, of the tables that are made while a wave is merged by so many cuts."""
        listed = -(-self.rows // BLOCK) + 2 * self.groups
        pieces = self.pieces * (7 * cuts + 8) + listed * (5 * cuts + 16)
        samples = self.samples + 10 * (self.samples // CLUSTER) + 4 * self.samples
        few = (self.groups + self.tensors) * (40 * cuts + 24)
        return WORD * (pieces + samples + few) + ROUNDING


class OnePass:
    """A wave that is streamed: its samples, its room for rows, and in the end its verdict."""

    def __init__(self, wave: Wave, sigmas: float, capacity: int | None) -> None:
        self.wave = wave
        self.samples = sample_sizes(wave.group_sizes)
        self.room = room_for(wave.group_sizes, wave.experts, sigmas, capacity)
        self.rows = int(max(self.samples.sum(), self.room.sum()))
        self.extent = Extent.of(wave, self.rows, int(self.samples.sum()))
        self.bad: Tensor | None = None


def reserve(size: int, device: torch.device) -> None:
    """Has torch's allocator hold `size` bytes for what follows; OutOfMemoryError if there is not as much."""
    held = [torch.empty(size, dtype=torch.uint8, device=device)]
    if device.type == "cuda":
        held += [torch.empty(SMALL_REQUEST, dtype=torch.uint8, device=device) for _ in range(SMALL_REQUESTS)]
    del held


def work_bytes(sizes: Sequence[int], rule: Rule) -> int:
    """Device memory, at most, that a merge takes beside tensors of these sizes and their wide copies."""
    every, experts = np.array(sizes, np.int64), len(rule.weights)
    steps = int(np.clip(every.sum() // (MANY_PIECES * BLOCK), 1, MOST_STEPS))
    pieces = int((-(-every // (BLOCK * steps))).sum()) + len(sizes)
    total = SMALL_REQUEST * SMALL_REQUESTS
    if rule.rescale and rule.trim is not Trim.NONE:
        blocks = int((-(-every // sums.REDUCTION_BLOCK)).sum())
        lanes = 2 * sums.REDUCTION_LANES * blocks
        total += WORD * (experts * (lanes + 2 * len(sizes)) + 2 * blocks + 4 * len(sizes)) + ROUNDING
    groups = every
    if rule.scope is Scope.MODEL:
        groups = every.sum(keepdims=True)
    rows = samples = searches = marks = 0
    if rule.trim.by_magnitude and any(density < 1 for density in rule.densities):
        searched = groups[groups > SMALL] if rule.scope is Scope.TENSOR else groups
        streamed = searched[searched >= ONE_PASS_FROM] if rule.trim is Trim.MAGNITUDE else searched[:0]
        most = max(1, MOST_SEARCHES // experts)
        searches = min(len(searched), most) * experts
        for at in range(0, len(streamed), most):
            wave = streamed[at : at + most]
            sampled = int(sample_sizes(wave).sum())
            rows = max(rows, sampled, int(room_for(wave, experts, SIGMAS).sum()))
            samples, marks = max(samples, sampled), max(marks, int(wave.sum()) // 8 + pieces * BLOCK // 8)
    extent = Extent(len(sizes), len(groups), pieces, rows, samples)
    gathered = rows * (4 * (experts + 1) + 12) + marks + WORD * BINS * searches
    return total + gathered + extent.lasting(experts) + extent.passing(cuts_of(rule))
