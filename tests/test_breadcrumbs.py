"""Breadcrumbs: two cuts for each expert, against the reference, by every route and instruction set."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from cases import Case, expected, outlier_cases
from harness import ISAS, assert_same_bits, run_native

import pymerge
from pymerge.backends import reference
from pymerge.backends.native import Isa, Settings
from pymerge.rule import ThresholdTies

CASES = outlier_cases()
LARGE = [case for case in CASES if case.size == 300_001]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden_case_on_every_isa(case: Case) -> None:
    rng = random.Random(case.id)
    group, merged = expected(case)
    for isa in ISAS:
        settings = Settings(
            threads=rng.choice((1, 2, 5)),
            tile=rng.choice((1024, 32768)),
            cached=rng.choice((0, 1 << 30)),
            isa=isa,
        )
        actual, report = run_native(group, settings)
        assert_same_bits(group, actual, merged)
        assert report.nan_outputs == sum(int(x.isnan().sum()) for x in merged)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_missed_brackets_and_overflows_change_nothing(case: Case, isa: Isa) -> None:
    group, merged = expected(case)
    fallbacks = 0
    for bias, memory, cached in itertools.product((0.3, -0.3, 0.0), (64, 1 << 26), (0, 1 << 30)):
        settings = Settings(threads=2, isa=isa, bracket_bias=bias, memory=memory, cached=cached)
        actual, report = run_native(group, settings)
        assert_same_bits(group, actual, merged)
        fallbacks += report.fallbacks or 0
    assert fallbacks > 0, "nothing forced the exact route"


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_ordinary_data_takes_one_pass(case: Case) -> None:
    _, report = run_native(expected(case)[0], Settings(threads=2))
    assert report.fallbacks == 0


def test_by_hand() -> None:
    """Of ten entries one is an outlier (9), the four next largest are kept (8, 7, 6, 5)."""
    base = torch.zeros(10)
    expert = torch.tensor([1.0, -9, 3, 8, -5, 2, 7, 4, -6, 0])
    merged = pymerge.merge_tensors(base, [expert], method="breadcrumbs", density=0.4, gamma=0.1)
    assert merged.tolist() == [0, 0, 0, 8, -5, 0, 7, 0, -6, 0]


def test_where_the_shares_are_more_than_all_fewer_are_outliers() -> None:
    base, expert = torch.zeros(4), torch.tensor([4.0, -3, 2, 1])
    merged = pymerge.merge_tensors(base, [expert], method="breadcrumbs", density=0.75, gamma=0.5)
    assert merged.tolist() == [0, -3, 2, 1]


def test_a_small_gamma_drops_nothing() -> None:
    base, expert = torch.zeros(4), torch.tensor([4.0, -3, 2, 1])
    merged = pymerge.merge_tensors(base, [expert], method="breadcrumbs_ties", density=0.5, gamma=0.01)
    assert merged.tolist() == [4, -3, 0, 0]


def test_equal_magnitudes_lose_their_first_entries_as_outliers() -> None:
    magnitudes = torch.full((6,), 5)
    kept = reference.select_between(magnitudes, 0.5, 0.2, ThresholdTies.FIRST)
    assert kept.tolist() == [False, True, True, True, False, False]


def test_gamma_outside_its_range_is_refused() -> None:
    with pytest.raises(pymerge.PymergeError, match=r"gamma of expert 0 is 1\.5, which is outside 0 to 1"):
        pymerge.merge_tensors(torch.zeros(4), [torch.ones(4)], method="breadcrumbs", gamma=1.5)
