"""How far bfloat16 results lie from exact arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from parity_blends import blended
from parity_explain import flat
from parity_outcomes import UNIT, nearest
from parity_run import Merged, Numbers
from parity_settings import ROWS, SETTINGS, has_known_factors

from pymerge.methods import METHODS

# What was drawn shows in a result, but not the factor that each tool makes of it.
MEASURED = [
    (method, number)
    for method, number in ROWS
    if not METHODS[method].trim.drawn or has_known_factors(SETTINGS[method][number])
]
SIGNIFICANT_BITS, SMALLEST = 8, 2.0**-133


def errors(tensor: Merged, merged: torch.Tensor) -> Numbers:
    """The error of every element, in units of the last place of the exact value.

    Exact is the nearest value that exact arithmetic allows: by any choice among equal magnitudes (of task
    vectors rounded to bfloat16, which is to mergekit's favour) and by any draw.
    """
    values = flat(merged)
    exact = blended(tensor)[0] if tensor.rule.blend else nearest(tensor, values)
    unit = np.exp2(np.frexp(exact)[1] - float(SIGNIFICANT_BITS))
    # Sums that cancel to less than a float32 rounding of their inputs leave no place to count in.
    inputs = tensor.experts if tensor.base is None else [tensor.base, *tensor.experts]
    unit = np.maximum(unit, UNIT * np.max(np.abs(inputs), axis=0))
    found: Numbers = np.abs(values - exact) / np.maximum(unit, SMALLEST)
    return found
