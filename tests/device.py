"""Runs groups of torch tensors through the device kernels: on a GPU, or as fibers on the processor."""

from __future__ import annotations

import random
from types import ModuleType

import torch
from cases import Case, Group
from torch import Tensor

from pymerge.backends.cuda import KERNEL_DTYPES, Knobs, merge_tensors

# Small enough that groups of a few thousand elements are sampled, streamed in rounds, and share launches.
SMALL_PARTS = Knobs(piece=64, samples=256, small=256)


def has_kernels(group: Group) -> bool:
    """Whether every element type of a group is one that the device kernels take."""
    inputs = [x for row in group.experts for x in row] + (group.bases or [])
    dtypes = {x.dtype for x in inputs} | set(group.out_dtypes) | {group.cast or torch.float32}
    return dtypes <= set(KERNEL_DTYPES)


def run_device(
    group: Group,
    kernels: ModuleType,
    knobs: Knobs = SMALL_PARTS,
    seed: int | None = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """Merges a group; inputs must come out as they went in. `seed`: the fibers' schedule, None on a GPU."""
    bases = [[]] * len(group.names) if group.bases is None else [[base] for base in group.bases]
    rows = [[*base, *xs] for base, xs in zip(bases, group.experts, strict=True)]
    inputs = [[x.to(device, group.cast or x.dtype).contiguous() for x in row] for row in rows]
    before = [[x.clone() for x in row] for row in inputs]
    outs = [
        torch.zeros(xs[0].numel(), dtype=dtype, device=device)
        for xs, dtype in zip(group.experts, group.out_dtypes, strict=True)
    ]
    merge_tensors(group.names, inputs, outs, group.rule, knobs=knobs, kernels=kernels, stream=seed)
    for row, kept in zip(inputs, before, strict=True):
        for x, y in zip(row, kept, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "an input was modified"
    return [out.cpu() for out in outs]


def seed_of(case: Case) -> int:
    """A schedule for each case; now and then in order."""
    return random.Random(case.id).randrange(8)
