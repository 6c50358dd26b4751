"""The one order in which all backends add up reductions, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTION_BLOCK = 65_536
REDUCTION_LANES = 16


def ordered_sum(x: Tensor) -> Tensor:
    """The f64 sums over the last axis of an f64 tensor, in the one order that all backends use.

    Element i of a block of 65,536 adds to lane i % 16 in index order; the lanes of a block add up in order
    0..15; the blocks add up in index order. Padding with +0 changes no bit of a sum that starts at +0.
    """
    *lead, size = x.shape
    total = torch.zeros(lead, dtype=torch.float64, device=x.device)
    rows = min(REDUCTION_BLOCK, -(-size // REDUCTION_LANES) * REDUCTION_LANES) // REDUCTION_LANES
    if rows == 0:
        return total
    padding = -size % (rows * REDUCTION_LANES)
    blocks = torch.nn.functional.pad(x, (0, padding)).view(*lead, -1, rows, REDUCTION_LANES)
    lanes = torch.zeros_like(blocks[..., 0, :])
    for row in blocks.unbind(-2):
        lanes = lanes + row
    sums = torch.zeros_like(lanes[..., 0])
    for lane in lanes.unbind(-1):
        sums = sums + lane
    for block in sums.unbind(-1):
        total = total + block
    return total
