"""Every value that exact arithmetic allows the elements of a merge without a blend to have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from parity_fuses import fused
from parity_run import Merged, Numbers
from parity_sums import UNIT, Flags, Outcome, summed

__all__ = ["UNIT", "Flags", "Outcome", "nearest", "outcomes"]

FLOAT32 = np.dtype(np.float32)


def outcomes(tensor: Merged, working: np.dtype[Any] = FLOAT32) -> Iterator[Outcome]:
    """The possible values of every element, pymerge's own choice first; task vectors rank as `working`."""
    if tensor.rule.fuse or tensor.rule.trim.scored:
        yield from fused(tensor)
    else:
        yield from summed(tensor, working)


def nearest(tensor: Merged, values: Numbers) -> Numbers:
    """The possible value of every element that lies nearest to `values`; task vectors rank as bfloat16."""
    best = np.full(values.shape, np.inf)
    for outcome in outcomes(tensor, np.dtype(ml_dtypes.bfloat16)):
        closer = outcome.possible & (np.abs(outcome.value - values) < np.abs(best - values))
        best = np.where(closer, outcome.value, best)
    return best
