"""Beside mergekit in float32: every element further than 2 units from ours is explained, method by method."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_explain import UNEXPLAINED, explain, flat, ours_is_exact
from parity_run import Both, Merged, needs_mergekit, setting_results
from parity_settings import OURS_ALONE, ROWS, SETTINGS

from pymerge.methods import METHODS

pytestmark = needs_mergekit

FIXED = [(method, number) for method, number in ROWS if not METHODS[method].trim.drawn]
# Without a density nothing is drawn, so that the values can be compared too.
FIXED += [(method, 2) for method, row in METHODS.items() if row.trim.drawn]


def test_every_method_has_three_settings() -> None:
    assert SETTINGS.keys() == METHODS.keys() - set(OURS_ALONE)
    assert all(len(settings) >= 3 for settings in SETTINGS.values())


@pytest.mark.parametrize(("method", "number"), FIXED)
def test_differences_are_explained(method: str, number: int, results: Path) -> None:
    both = setting_results(results, method, number, "float32")
    reasons: Counter[str] = Counter()
    for tensor in both.tensors():
        assert ours_is_exact(tensor), tensor.name
        reasons += explain(tensor)
    assert UNEXPLAINED not in reasons, reasons


def largest_tensor(both: Both) -> Merged:
    return max(both.tensors(), key=lambda tensor: tensor.ours.numel())


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs_ties", "slerp", "karcher"])
def test_a_wrong_element_stays_unexplained(method: str, results: Path) -> None:
    tensor = largest_tensor(setting_results(results, method, 0, "float32"))
    wrong = tensor.theirs.clone().reshape(-1)
    wrong[100] += 64 * torch.finfo(torch.float32).eps * max(1e-2, abs(wrong[100].item()))
    planted = dataclasses.replace(tensor, theirs=wrong.reshape(tensor.theirs.shape))
    assert explain(planted)[UNEXPLAINED] == 1


def test_a_kept_entry_below_the_threshold_stays_unexplained(results: Path) -> None:
    """What equal magnitudes excuse ends at the threshold."""
    tensor = largest_tensor(setting_results(results, "ties", 5, "float32"))
    (expert,) = tensor.experts
    assert tensor.base is not None
    trimmed = (
        torch.from_numpy(expert != tensor.base)
        & (tensor.ours.reshape(-1) == torch.from_numpy(tensor.base).float())
    ).nonzero()
    at = int(trimmed[0])
    wrong = tensor.theirs.clone().reshape(-1)
    wrong[at] = expert[at]
    planted = dataclasses.replace(tensor, theirs=wrong.reshape(tensor.theirs.shape))
    assert explain(planted)[UNEXPLAINED] == 1


def test_both_keep_exactly_k(results: Path) -> None:
    for tensor in setting_results(results, "ties", 5, "float32").tensors():
        assert tensor.base is not None
        (density,) = tensor.rule.densities
        changed = int((tensor.experts[0] != tensor.base).sum())
        wanted = min(changed, max(1, int(density * tensor.base.size)))
        for merged in (tensor.ours, tensor.theirs):
            assert int((merged.reshape(-1) != torch.from_numpy(tensor.base).float()).sum()) == wanted, (
                tensor.name
            )


@pytest.mark.parametrize("number", range(3))
def test_fusion_takes_the_largest_of_each_row(number: int, results: Path) -> None:
    """Float32 leaves most importances open, but within a row they order like the task vector."""
    for tensor in setting_results(results, "arcee_fusion", number, "float32").tensors():
        assert tensor.base is not None
        size = np.abs(tensor.experts[0] - tensor.base).reshape(-1, tensor.ours.shape[-1])
        for merged in (tensor.ours, tensor.theirs):
            taken = (flat(merged) != tensor.base).reshape(size.shape)
            least = np.where(taken, size, np.inf).min(axis=1)
            assert (least >= np.where(taken, 0, size).max(axis=1)).all(), tensor.name
