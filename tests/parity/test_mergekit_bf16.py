"""Beside mergekit in bfloat16: our error against exact arithmetic is not larger, for any method.

The errors are `parity_errors.errors`; their mean and their maximum over all elements of a merge are compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_errors import MEASURED, errors
from parity_run import needs_mergekit, setting_results

pytestmark = needs_mergekit


@pytest.mark.parametrize(("method", "number"), MEASURED)
def test_our_error_is_not_larger(method: str, number: int, results: Path) -> None:
    ours, theirs = [], []
    for tensor in setting_results(results, method, number, "bfloat16").tensors():
        ours.append(errors(tensor, tensor.ours))
        theirs.append(errors(tensor, tensor.theirs))
    mine, other = np.concatenate(ours), np.concatenate(theirs)
    assert mine.mean() <= other.mean()
    assert mine.max() <= other.max()
