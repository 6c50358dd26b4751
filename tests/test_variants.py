"""Several rules over the same inputs in one run: each result is that of a run of its own, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cases import DATA, Group
from harness import ISAS, assert_same_bits, run_native, run_variants

from pymerge.backends.native import Isa, Settings
from pymerge.methods import METHODS
from pymerge.rule import Rule, Scope, ThresholdTies
from pymerge.ruling import rule_for

EXPERTS = 4
DENSITIES, LAMBDAS, WEIGHTS = (0.1, 0.45, 1.0), (1.0, 0.3, -2.0), ((1.0,) * EXPERTS, (0.5, 1.5, -0.25, 1.0))


def rules(method: str, **options: object) -> list[Rule]:
    return [
        rule_for(
            METHODS[method],
            weights=weights,
            densities=[density] * EXPERTS,
            epsilons=[min(density, 1 - density) / 2 or 0.1] * EXPERTS,
            lambda_=lambda_,
            has_base=METHODS[method].base is not METHODS["linear"].base,
            **options,  # type: ignore[arg-type]
        )
        for density, weights, lambda_ in itertools.product(DENSITIES, WEIGHTS, LAMBDAS)
    ]


def tensors(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, data: str = "realistic") -> Group:
    """A group without a rule of its own."""
    draw = torch.Generator().manual_seed(5)
    bases, experts = [], []
    for shape in sizes:
        base, xs = DATA[data](torch.Size(shape).numel(), EXPERTS, draw)
        bases.append(base.to(dtype).reshape(shape))
        experts.append([x.to(dtype).reshape(shape) for x in xs])
    names = [f"t{(i * 3) % 4}.{i}" for i in range(len(sizes))]
    rule = rules("ties")[0]
    return Group(names, bases, experts, rule, [dtype] * len(sizes), None)


def check(group: Group, wanted: Sequence[Rule], settings: Settings, offset: int = 0) -> None:
    with_base = group if wanted[0].task_vector else replace(group, bases=None)
    together, report = run_variants(with_base, wanted, settings, offset)
    for number, (rule, merged) in enumerate(zip(wanted, together, strict=True)):
        alone, expected = run_native(replace(with_base, rule=rule), Settings(threads=1))
        assert_same_bits(with_base, merged, alone)
        assert report.nan_of[number] == expected.nan_outputs
    assert report.nan_outputs == sum(report.nan_of)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "method",
    ["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della", "sce", "magmax", "multislerp"],
)
def test_every_kind_of_method(method: str, isa: Isa) -> None:
    group = tensors([(130, 200), (7,), (1, 1), (3, 0), (33, 5)], torch.bfloat16)
    settings = Settings(threads=2, isa=isa, tile=4096)
    check(group, rules(method, seed=11), settings)
    # The core merges tensors of one group by masks, too, though no rule of a recipe asks for that.
    check(group, [replace(rule, scope=Scope.MODEL) for rule in rules(method, seed=11)], settings)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("ties", list(ThresholdTies))
@pytest.mark.parametrize("data", ["realistic", "atom", "nan", "two_values", "zero"])
def test_trims_by_magnitude(data: str, ties: ThresholdTies, scope: Scope) -> None:
    group = tensors([(90_001,), (17,), (40_000,)], torch.float32, data)
    routes = (0, 1 << 30) if scope is Scope.TENSOR else (0,)
    for rescale, cached in itertools.product((False, True), routes):
        wanted = rules("ties", scope=scope, threshold_ties=ties, rescale=rescale)
        check(group, wanted, Settings(threads=2, tile=8192, cached=cached))


@pytest.mark.parametrize("cached", [0, 1 << 30])
@pytest.mark.parametrize("sizes", [(200_000,), (9_000,)])
def test_trims_unlike_each_other(sizes: tuple[int, ...], cached: int) -> None:
    """Each is searched for by itself, and some are followed by results that differ in lambda alone."""
    group = tensors([sizes], torch.bfloat16, "atom")
    first, all_ = (rules("ties", threshold_ties=ties)[0] for ties in ThresholdTies)
    wanted = [first, all_, replace(all_, lambda_=0.3), rules("breadcrumbs")[0], replace(all_, lambda_=2.0)]
    check(group, wanted, Settings(threads=2, cached=cached))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    check(tensors([(150_000,)], dtype), rules("breadcrumbs_ties"), Settings(threads=2))


@pytest.mark.parametrize("offset", [0, 2, 6])
def test_results_that_bypass_the_cache(offset: int) -> None:
    """Large results in memory, with cuts that fall anywhere in a tile."""
    check(tensors([(700_001,)], torch.bfloat16), rules("ties"), Settings(threads=2), offset)


@pytest.mark.parametrize("settings", [Settings(bracket_bias=0.2), Settings(memory=1 << 16, sigmas=12.0)])
def test_missed_brackets_and_little_memory(settings: Settings) -> None:
    group = tensors([(300_000,)], torch.bfloat16)
    together, report = run_variants(group, rules("ties"), settings)
    assert (report.fallbacks or 0) > 0, "nothing was missed: the test shows nothing"
    for rule, merged in zip(rules("ties"), together, strict=True):
        assert_same_bits(group, merged, run_native(replace(group, rule=rule), Settings())[0])


def test_thresholds_of_every_variant_serve_again() -> None:
    group = tensors([(200_000,), (30_000,)], torch.bfloat16)
    wanted = rules("ties")
    first, found = run_variants(group, wanted, Settings(threads=2))
    again, report = run_variants(group, wanted, Settings(threads=2), thresholds=found.thresholds)
    for a, b in zip(first, again, strict=True):
        assert_same_bits(group, a, b)
    trimming = [rule for rule in wanted if rule.densities[0] < 1]
    assert sum(map(bool, found.thresholds)) >= 2 * len({rule.densities for rule in trimming})
    assert report.bytes_read < found.bytes_read


def test_variants_in_lambda_alone_cost_one_reading() -> None:
    group = tensors([(200_000,)], torch.bfloat16)
    rule = rules("task_arithmetic")[0]
    wanted = [replace(rule, lambda_=float(number)) for number in range(16)]
    _, report = run_variants(group, wanted, Settings())
    assert report.bytes_read == (EXPERTS + 1) * 200_000 * 2
    assert report.bytes_written == 16 * 200_000 * 2


@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.5, 1.0, 1.0, 2.0), (1.0, 1.0)])
def test_some_variants_copy_where_others_scale(scales: Sequence[float]) -> None:
    group = tensors([(90_001,), (17,), (0,)], torch.bfloat16)
    alone = replace(group, bases=None, experts=[xs[:1] for xs in group.experts])
    wanted = [rule_for(METHODS["passthrough"], weights=[1.0], options={"scale": scale}) for scale in scales]
    check(alone, wanted, Settings(threads=2))
