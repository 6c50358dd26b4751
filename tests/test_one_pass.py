"""The one-pass route: ordinary data takes it, within one reading and bounded memory."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from cases import Group
from harness import ISAS, assert_same_bits, run_native

from pymerge.backends import reference
from pymerge.backends.native import Isa, Settings
from pymerge.methods import METHODS
from pymerge.rule import Scope, ThresholdTies
from pymerge.ruling import rule_for


def reference_of(group: Group) -> list[torch.Tensor]:
    return reference.merge_group(
        group.names, group.bases, group.experts, group.rule, group.out_dtypes, group.cast
    )


def ordinary(
    dtype: torch.dtype,
    n: int = 600_000,
    k: int = 4,
    scope: Scope = Scope.TENSOR,
    ties: ThresholdTies = ThresholdTies.FIRST,
) -> Group:
    """Normal weights with heavy-tailed updates, a third of them untouched: what real fine-tunes look like."""
    draw = torch.Generator().manual_seed(3)
    bases, experts = [], []
    for size in (n, n // 3):
        base = (torch.randn(size, generator=draw) * 0.02).to(dtype)
        updates = torch.randn(k, size, generator=draw).pow(3) * 5e-4
        updates[torch.rand(k, size, generator=draw) < 1 / 3] = 0
        bases.append(base)
        experts.append([(base + update).to(dtype) for update in updates])
    rule = rule_for(METHODS["ties"], weights=[1.0] * k, densities=[0.2] * k, scope=scope, threshold_ties=ties)
    return Group(["a", "b"], bases, experts, rule, [dtype, dtype], None)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("ties", list(ThresholdTies))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ordinary_data_is_merged_in_one_pass(
    dtype: torch.dtype, ties: ThresholdTies, scope: Scope, isa: Isa
) -> None:
    group = ordinary(dtype, scope=scope, ties=ties)
    actual, report = run_native(group, Settings(threads=2, isa=isa))
    assert_same_bits(group, actual, reference_of(group))
    assert report.fallbacks == 0, "the bracket missed, or the undecided did not fit"
    inputs = 5 * sum(x.nbytes for x in group.bases or [])
    assert report.bytes_read < 1.25 * inputs, "the inputs were read more than once"
    if ties is ThresholdTies.FIRST:
        assert 0 < (report.undecided or 0) < 0.25 * report.elements


@pytest.mark.parametrize("scope", list(Scope))
def test_undecided_positions_spill_to_a_file(scope: Scope) -> None:
    group = ordinary(torch.bfloat16, n=3_000_000, scope=scope)
    with tempfile.TemporaryFile() as file:
        settings = Settings(threads=2, memory=3 << 20, sigmas=12.0, spill=file.fileno())
        actual, report = run_native(group, settings)
        assert os.fstat(file.fileno()).st_size > 0, "nothing was spilled: the test shows nothing"
    assert report.fallbacks == 0
    assert_same_bits(group, actual, reference_of(group))


def test_given_thresholds_need_no_search() -> None:
    group = ordinary(torch.bfloat16)
    first, found = run_native(group, Settings(threads=2))
    again, report = run_native(group, Settings(threads=2), thresholds=found.thresholds)
    assert_same_bits(group, again, first)
    assert report.undecided == 0
    assert report.bytes_read == 5 * sum(x.nbytes for x in group.bases or [])


@pytest.mark.parametrize("cached", [0, 1 << 30])
@pytest.mark.parametrize("share", [0.15, 0.2, 0.6])
@pytest.mark.parametrize("ties", list(ThresholdTies))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_thresholds_among_nans(dtype: torch.dtype, ties: ThresholdTies, share: float, cached: int) -> None:
    """All NaN are one magnitude, above infinity: if more of them than are kept, the index decides."""
    group = ordinary(dtype, n=120_000, ties=ties)
    draw = torch.Generator().manual_seed(5)
    for experts in group.experts:
        for x in experts:
            x[torch.rand(x.numel(), generator=draw) < share] = torch.nan
    actual, report = run_native(group, Settings(threads=2, cached=cached))
    expected = reference_of(group)
    assert_same_bits(group, actual, expected)
    assert report.nan_outputs == sum(int(x.isnan().sum()) for x in expected)


def test_an_overflow_after_the_first_round_counts_every_nan_once() -> None:
    group = ordinary(torch.float32, n=300_000)
    for experts in group.experts:
        experts[0][::3] = torch.nan
    settings = Settings(threads=1, tile=1024, memory=1 << 20, sigmas=40.0)
    actual, report = run_native(group, settings)
    expected = reference_of(group)
    assert report.fallbacks, "nothing overflowed: the test shows nothing"
    assert_same_bits(group, actual, expected)
    assert report.nan_outputs == sum(int(x.isnan().sum()) for x in expected)


@pytest.mark.parametrize("seed", [1, 16, 23, 37])
def test_few_large_tensors_among_many_small_ones_are_merged_in_one_pass(seed: int) -> None:
    """Few large pieces show little of the model, however many small ones come with them."""
    draw = torch.Generator().manual_seed(seed)
    experts = [
        [torch.randn(size, generator=draw) * torch.randn((), generator=draw).exp() for _ in range(2)]
        for size in [300] * 300 + [30_000] * 4
    ]
    rule = rule_for(METHODS["ties"], weights=[1.0] * 2, densities=[0.3] * 2, scope=Scope.MODEL)
    names = [f"{i:04}" for i in range(len(experts))]
    bases = [torch.zeros_like(xs[0]) for xs in experts]
    group = Group(names, bases, experts, rule, [torch.float32] * len(names), None)
    actual, report = run_native(group, Settings(threads=2))
    assert_same_bits(group, actual, reference_of(group))
    assert report.fallbacks == 0
