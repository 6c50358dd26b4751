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


def ranked_rows(kind: str, rows: int, width: int) -> torch.Tensor:
    """Rows that are hard to rank: of few values, in one narrow bin, with NaNs, or with one far outlier."""
    g = torch.Generator().manual_seed(width)
    noise = torch.randn(rows, width, generator=g)
    match kind:
        case "equal":
            return torch.full((rows, width), -3.0)
        case "two values":
            return torch.where(noise > 0, 1.0, -2.0)
        case "one bin":
            return 1.0 + torch.randint(0, 50, (rows, width), generator=g) * 2.0**-23
        case "not finite":
            noise[:, ::3] = torch.nan
            noise[:, 1::5] = -torch.inf
            return noise
        case "outlier":
            noise[:, width // 2] = 1e30
            return torch.where(noise > 0.5, 0.0, noise)
        case _:
            return noise.bfloat16().float()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(70, 1), (129, 2), (41, 63), (3, 4097), (3, 65_536), (2, 65_537), (1, 300_000)]
)
@pytest.mark.parametrize("kind", ["equal", "two values", "one bin", "not finite", "outlier", "bf16"])
def test_hard_rows_are_ranked_exactly(kind: str, shape: tuple[int, int], isa: Isa) -> None:
    x = ranked_rows(kind, *shape)
    for density, epsilon, memory in ((0.5, 0.15, 1 << 26), (0.4, 0.39, 0), (0.3, 2e-9, 1 << 26)):
        rule = rule_for(
            METHODS["della_linear"],
            weights=[1],
            densities=[density],
            epsilons=[epsilon],
            rescale=False,
            seed=3,
        )
        group = Group([""], [torch.zeros_like(x)], [[x]], rule, [torch.float32], None)
        merged = reference.merge_group([""], [torch.zeros_like(x)], [[x]], rule, [torch.float32])
        actual, _ = run_native(group, Settings(threads=2, memory=memory, isa=isa))
        assert_same_bits(group, actual, merged)
