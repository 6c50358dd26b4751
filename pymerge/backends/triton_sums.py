"""The sums behind rescale, in f64 and the order that the contract fixes for every backend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pymerge.backends import reference, sums
from pymerge.backends.triton_search import EXACT
from pymerge.backends.triton_tables import KINDS, TYPES, Wave
from pymerge.kernels import stats
from pymerge.rule import Trim

# Blocks that a program adds up side by side: one thread for each of their lanes.
WIDE = 8


class Masses:
    """Sums of |d| and of the kept |d| for every tensor and expert of a wave, and the scales they give."""

    def __init__(self, wave: Wave, trim: Trim) -> None:
        self.wave, self.trim = wave, trim
        blocks = -(-wave.sizes // sums.REDUCTION_BLOCK)
        begins = np.append(0, np.cumsum(blocks))
        self.begins = wave.send(begins)
        self.places = wave.send(np.stack([wave.groups, wave.origins, begins[:-1]], 1))
        self.launches = []
        for kind in wave.kinds_used:
            rows = [
                (i, first)
                for i, member in enumerate(wave.members)
                if KINDS[member.experts[0].dtype] == kind
                for first in range(0, int(blocks[i]), WIDE)
            ]
            self.launches.append((kind, len(rows), wave.send(np.array(rows, np.int64).reshape(-1, 2))))
        lanes = (int(begins[-1]), wave.experts, 2, sums.REDUCTION_LANES)
        self.lanes = torch.empty(lanes, dtype=torch.float64, device=wave.device)
        shape = (len(wave.members), wave.experts, 2)
        self.sums = torch.empty(shape, dtype=torch.float64, device=wave.device)

    def scales(self, cuts: Tensor) -> Tensor:
        """What each task vector is multiplied by, f32 (T, K), when it is trimmed by `cuts` or at random."""
        wave = self.wave
        for kind, count, blocks in self.launches:
            if count:
                stats.masses[(count * wave.experts,)](
                    blocks,
                    wave.addresses_on,
                    wave.sizes_on,
                    self.places,
                    cuts,
                    wave.keys_on,
                    wave.limits_on,
                    self.lanes,
                    K=wave.experts,
                    IN=TYPES[kind][1],
                    TRIM=list(Trim).index(self.trim),
                    ROWS=sums.REDUCTION_BLOCK // sums.REDUCTION_LANES,
                    WIDE=WIDE,
                    **EXACT,
                )
        grid = (len(wave.members) * wave.experts * 2,)
        stats.add_up[grid](self.lanes, self.begins, self.sums, K=wave.experts, **EXACT)
        before, after = self.sums.unbind(-1)
        whole = wave.send(np.array(wave.rule.densities) >= 1)
        one = whole | (before < reference.TINY_SUM) | (after < reference.TINY_SUM)
        return torch.where(one, 1.0, before / after).float()
