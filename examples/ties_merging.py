"""The TIES paper's own `ties_merging` (prateeky2806/ties-merging, src/utils/merge_utils.py), made by pymerge.

Import it there instead of the original: it takes and returns the same flat task vectors.
"""

from __future__ import annotations

import torch

import pymerge

NORMALIZES = {"dis-mean": True, "dis-sum": False}


def ties_merging(
    flat_task_checks: torch.Tensor, reset_thresh: float = 20, merge_func: str = "dis-mean"
) -> torch.Tensor:
    """Merges task vectors of shape (models, entries) into one of shape (entries,), in their element type.

    `reset_thresh`: the share of entries kept, above 1 in percent. `merge_func`: "dis-mean" or "dis-sum".
    """
    if merge_func not in NORMALIZES:
        raise ValueError(f"merge_func is {merge_func!r}, expected one of {', '.join(NORMALIZES)}")
    return pymerge.merge_tensors(
        torch.zeros_like(flat_task_checks[0]),
        flat_task_checks.unbind(),
        preset="paper",
        density=reset_thresh / 100 if reset_thresh > 1 else reset_thresh,
        normalize=NORMALIZES[merge_func],
    )
