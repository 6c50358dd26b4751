"""How a memory limit is shared out between the tiles of the workers and the undecided lists."""

from __future__ import annotations

import os
from typing import NamedTuple

from pymerge.errors import PymergeError
from pymerge.planner import Plan
from pymerge.rule import READ_ONCE

TILE = 32_768  # elements; nine bf16 inputs of one tile stay in a 1 MiB L2
SMALLEST_TILE = 4_096
LISTS = 64 << 20  # bytes for undecided positions, or for masks and scores, when nobody sets a limit
SMALLEST_LISTS = 1 << 20
PINNED = 64 << 20  # bytes, at most, of the page-locked buffers through which files reach a GPU
ELEMENT_BYTES = 4  # of a tile as the kernels see it; f64 inputs take twice that


class Budget(NamedTuple):
    """Memory of one run: `threads` workers with tiles of `tile` elements, undecided lists of `lists` bytes.

    `total`: bytes, without the interpreter and its libraries. `total_with_gpu`: the most when a GPU merges
    what it can and the workers the rest; the GPU's own memory is not counted.
    """

    threads: int
    tile: int
    lists: int
    total: int
    total_with_gpu: int


def budget(plan: Plan, threads: int | None = None, max_memory: int | None = None) -> Budget:
    """Share out `max_memory` bytes (None: the defaults). Raises PymergeError when it is too little."""
    threads = threads or len(os.sched_getaffinity(0))
    streams = plan.streams + 2
    trims = any(rule.trim.scored or any(density < 1 for density in rule.densities) for rule in plan.rules)
    if max_memory is None:
        tile, lists = TILE, LISTS if trims else 0
    else:
        tile, lists = TILE, SMALLEST_LISTS if trims else 0
        blends = any(rule.blend for rule in plan.rules)
        smallest = READ_ONCE if blends else SMALLEST_TILE  # a blend takes that many at once
        while tile > smallest and threads * streams * tile * ELEMENT_BYTES > max_memory // 2:
            tile //= 2
        least = threads * streams * tile * ELEMENT_BYTES + lists
        if least > max_memory:
            raise PymergeError(
                f"{max_memory:,} bytes of memory are too little: {threads} threads on"
                f" {plan.streams} inputs need {least:,}"
            )
        lists = min(LISTS, max_memory - least + lists) if trims else 0
    total = threads * streams * tile * ELEMENT_BYTES + lists
    return Budget(threads, tile, lists, total, total + pinned_bytes(max_memory))


def pinned_bytes(max_memory: int | None) -> int:
    """What the page-locked buffers may take where all memory is limited to `max_memory` bytes."""
    return PINNED if max_memory is None else min(PINNED, max_memory)
