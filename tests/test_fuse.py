"""Masks, scores and fuses: the compiled core against the reference, by every instruction set and route."""

from __future__ import annotations

import random

import pytest
import torch
from blend_cases import expected
from cases import Group
from fuse_cases import FuseCase, fuse_cases, large_fuse_cases
from harness import ISAS, assert_same_bits, run_native

from pymerge.backends import reference
from pymerge.backends.native import Isa, Settings
from pymerge.methods import METHODS
from pymerge.ruling import rule_for


@pytest.mark.parametrize("case", fuse_cases(), ids=lambda case: case.id)
def test_golden_case_on_every_isa(case: FuseCase) -> None:
    rng = random.Random(case.id)
    group, merged = expected(case)
    assert merged is not None
    for isa in ISAS:
        settings = Settings(threads=rng.choice((1, 2, 5)), tile=rng.choice((64, 1024, 32768)), isa=isa)
        actual, report = run_native(group, settings, offset=rng.choice((0, 8)))
        assert_same_bits(group, actual, merged)
        assert report.nan_outputs == sum(int(x.isnan().sum()) for x in merged)


@pytest.mark.parametrize("memory", [0, 1 << 26], ids=["made twice", "kept"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", large_fuse_cases(), ids=lambda case: case.id)
def test_masks_kept_or_made_again_are_the_same(case: FuseCase, isa: Isa, memory: int) -> None:
    rng = random.Random(case.id)
    group, merged = expected(case)
    assert merged is not None
    tile = rng.choice((4096, 32768, 131_072))
    actual, _ = run_native(group, Settings(threads=rng.choice((1, 3)), tile=tile, memory=memory, isa=isa))
    assert_same_bits(group, actual, merged)


def test_a_word_equal_to_its_rounded_limit_is_dropped() -> None:
    """Where ranks are denser than words, the limit of a rank is one of few words: below it is not at it."""
    n, at, below = 300_000, 195_149, 160_127
    x = torch.full((n,), 4.0)
    x[torch.arange(n)[torch.arange(n) != at][:below]] = 1.0
    x[at] = 2.0
    rule = rule_for(
        METHODS["della_linear"], weights=[1], densities=[0.5], epsilons=[1e-6], rescale=False, seed=5
    )
    group = Group([""], [torch.zeros(n)], [[x]], rule, [torch.float32], None)
    merged = reference.merge_group([""], [torch.zeros(n)], [[x]], rule, [torch.float32])
    actual, _ = run_native(group, Settings())
    assert merged[0][at] == 0
    assert_same_bits(group, actual, merged)
