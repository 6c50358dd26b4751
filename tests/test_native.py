"""The compiled core against the reference: the same bits, whatever the route taken."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from cases import (
    BF16,
    DATA,
    F32,
    METHODS,
    Case,
    Group,
    bits,
    expected,
    golden_cases,
    outlier_cases,
)
from harness import ISAS, assert_same_bits, run_native
from hypothesis import given
from hypothesis import strategies as st

from pymerge.backends import reference
from pymerge.backends.native import Isa, Settings
from pymerge.backends.rounding import magnitude
from pymerge.rule import Scope, ThresholdTies, Trim

CASES = golden_cases()
LARGE = [case for case in CASES if case.method == "ties" and case.size == 300_001]
THREADS = (1, 2, 5)
TILES = (1024, 32768, 131072)
MEMORY = (1 << 12, 1 << 26)
CACHED = (0, 1 << 14, 1 << 30)
AMPLE = Settings(threads=2)
# Every pair of (ISA, threads), (ISA, tile) and (threads, tile) once.
SQUARE = [
    (isa, threads, TILES[(i + j) % len(TILES)])
    for i, isa in enumerate(ISAS)
    for j, threads in enumerate(THREADS)
]


def is_trimmed(case: Case) -> bool:
    return case.method == "ties" and case.density not in (0.0, 1.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden_case_on_every_isa(case: Case) -> None:
    rng = random.Random(case.id)
    group, merged = expected(case)
    for isa in ISAS:
        settings = Settings(
            threads=rng.choice(THREADS),
            tile=rng.choice(TILES),
            memory=rng.choice(MEMORY),
            cached=rng.choice(CACHED),
            isa=isa,
        )
        actual, report = run_native(group, settings, offset=rng.choice((0, 0, 8, 24)))
        assert_same_bits(group, actual, merged)
        assert report.nan_outputs == sum(int(x.isnan().sum()) for x in merged)
        assert report.elements == sum(group.experts[i][0].numel() for i in range(len(group.names)))


@pytest.mark.parametrize(("isa", "threads", "tile"), SQUARE)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_large_ties_for_every_isa_thread_count_and_tile(
    case: Case, isa: Isa, threads: int, tile: int
) -> None:
    group, merged = expected(case)
    actual, _ = run_native(group, Settings(threads=threads, tile=tile, isa=isa))
    assert_same_bits(group, actual, merged)


@pytest.mark.parametrize("cached", [0, 1 << 30])
@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_thresholds_are_those_of_a_full_sort(case: Case, bias: float, cached: int) -> None:
    """A threshold says: keep what is larger, and of what is equal the flat indices below its own."""
    group, _ = expected(case)
    assert group.bases is not None
    _, report = run_native(group, Settings(threads=2, bracket_bias=bias, cached=cached))
    parts = [[i] for i in range(len(group.names))]
    if case.scope is Scope.MODEL:
        parts = [sorted(range(len(group.names)), key=lambda i: group.names[i])]
    for part, found in zip(parts, report.thresholds, strict=True):
        for k, threshold in enumerate(found):
            d = torch.cat([group.experts[i][k].float() - group.bases[i].float() for i in part])
            m, flat = magnitude(d), torch.arange(d.numel())
            equal = (m == threshold.magnitude) & (flat < min(threshold.index, d.numel()))
            kept = (m > threshold.magnitude) | equal
            assert torch.equal(kept, reference.select(m, float(case.density), case.ties))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_a_missed_bracket_changes_nothing(case: Case, isa: Isa) -> None:
    group, merged = expected(case)
    fallbacks = 0
    for bias, cached in itertools.product((0.3, -0.3), (0, 1 << 30)):
        settings = Settings(threads=2, isa=isa, bracket_bias=bias, cached=cached)
        actual, report = run_native(group, settings)
        assert_same_bits(group, actual, merged)
        fallbacks += report.fallbacks or 0
    assert fallbacks > 0, "the bias did not force a miss"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_an_overflowing_undecided_list_changes_nothing(case: Case, isa: Isa) -> None:
    group, merged = expected(case)
    actual, _ = run_native(group, Settings(threads=2, isa=isa, memory=64, sigmas=20.0))
    assert_same_bits(group, actual, merged)


@pytest.mark.parametrize(
    "case", [c for c in CASES if is_trimmed(c) and c.size > 4000][:10], ids=lambda c: c.id
)
def test_golden_ties_with_missed_brackets_and_little_memory(case: Case) -> None:
    group, merged = expected(case)
    for isa, (bias, memory), cached in itertools.product(ISAS, ((0.3, 64), (-0.3, 1 << 14)), (0, 1 << 30)):
        settings = Settings(threads=2, tile=1024, isa=isa, bracket_bias=bias, memory=memory, cached=cached)
        assert_same_bits(group, run_native(group, settings)[0], merged)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [1, 2, 6, 30])
@pytest.mark.parametrize("method", METHODS)
def test_addresses_off_alignment(method: str, offset: int, isa: Isa) -> None:
    cases = CASES if METHODS[method][1] is not Trim.OUTLIERS else outlier_cases()
    case = next(c for c in cases if c.method == method and c.size > 4000 and c.density not in (0.0, 1.0))
    group, merged = expected(case)
    actual, _ = run_native(group, Settings(threads=2, tile=1024, isa=isa), offset)
    assert_same_bits(group, actual, merged)


def test_one_expert_and_no_tensors() -> None:
    case = dataclasses.replace(LARGE[0], size=33, k=1)
    group, merged = expected(case)
    assert_same_bits(group, run_native(group, AMPLE)[0], merged)
    empty = Group([], [], [], group.rule, [], None)
    actual, report = run_native(empty, AMPLE)
    assert actual == []
    assert report.elements == 0


def test_many_small_tensors_of_mixed_types() -> None:
    """More tensors than tiles: they share tiles, and each keeps its own types and its own random key."""
    g = torch.Generator().manual_seed(5)
    for method in METHODS:
        case = dataclasses.replace(LARGE[0], method=method, size=33, k=2, density=0.5, scope=Scope.TENSOR)
        sizes = torch.randint(0, 700, (300,), generator=g).tolist()
        made = [DATA["realistic"](n, 2, g) for n in sizes]
        dtypes = [(BF16, F32, torch.float16, torch.float64)[i % 4] for i in range(len(sizes))]
        group = Group(
            [f"layer.{i}" for i in range(len(sizes))],
            [b.to(d) for (b, _), d in zip(made, dtypes, strict=True)] if case.rule.task_vector else None,
            [[x.to(d) for x in xs] for (_, xs), d in zip(made, dtypes, strict=True)],
            case.rule,
            dtypes,
            None,
        )
        merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
        assert_same_bits(group, run_native(group, AMPLE)[0], merged)


def test_two_roundings_of_f64_are_never_made() -> None:
    """f64 to 16 bits by way of f32 would round these halfway cases twice."""
    just_above = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40, -(1 + 2**-8 + 2**-40), 2.0**-134 * (1 + 2**-50)]
    )
    just_above = just_above.to(torch.float64) + torch.tensor(
        [2**-40, 2**-40, -(2**-40), 0.0], dtype=torch.float64
    )
    for out in (BF16, torch.float16):
        for cast in (None, out):
            case = dataclasses.replace(LARGE[0], method="linear", size=4, k=1, normalize=False)
            group = Group(["x"], None, [[just_above]], case.rule, [out], cast)
            merged = reference.merge_group(group.names, None, group.experts, group.rule, [out], cast)
            assert_same_bits(group, run_native(group, AMPLE)[0], merged)


# -- properties ---------------------------------------------------------------------------------------------

sizes = st.integers(1, 20_000)
counts = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
densities = st.floats(1e-6, 0.999)


def ties_group(size: int, k: int, seed: int, density: float, ties: ThresholdTies, **changes: object) -> Group:
    """A TIES case on realistic bf16 data, of one tensor."""
    case = Case(
        "ties",
        size,
        k,
        "bf16",
        "realistic",
        density,
        "unit",
        1.0,
        Scope.TENSOR,
        ties,
        True,
        False,
        None,
        None,
        seed,
    )
    group = case.build()
    at = case.sizes.index(size)
    assert group.bases is not None
    return Group(
        [group.names[at]],
        [group.bases[at]],
        [group.experts[at]],
        dataclasses.replace(group.rule, **changes),  # type: ignore[arg-type]
        [F32],
        None,
    )


@given(sizes, seeds, densities)
def test_first_keeps_exactly_k(size: int, seed: int, density: float) -> None:
    """With one expert, no zero deltas and a zero base, what is kept is what is not zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 40, (size,), generator=g) * torch.where(torch.rand(size, generator=g) < 0.5, -1, 1)
    rule = ties_group(size, 1, seed, density, ThresholdTies.FIRST).rule
    group = Group(["x"], [torch.zeros(size)], [[x.to(F32)]], rule, [F32], None)
    merged, _ = run_native(group, AMPLE)
    assert int((merged[0] != 0).sum()) == max(1, int(density * size))


@given(sizes, counts, seeds, densities)
def test_permuting_experts_keeps_the_same_entries(size: int, k: int, seed: int, density: float) -> None:
    """A kept set depends on its own expert only: with one live weight, order cannot matter."""
    group = ties_group(size, k, seed, density, ThresholdTies.FIRST, weights=(1.0, *([0.0] * (k - 1))))
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)).tolist()
    rule = dataclasses.replace(group.rule, weights=tuple(group.rule.weights[i] for i in order))
    moved = dataclasses.replace(group, experts=[[group.experts[0][i] for i in order]], rule=rule)
    assert torch.equal(bits(run_native(group, AMPLE)[0][0]), bits(run_native(moved, AMPLE)[0][0]))


@given(sizes, counts, seeds, densities, st.integers(-20, 20), st.sampled_from(list(ThresholdTies)))
def test_scaling_by_a_power_of_two_scales_the_result(
    size: int, k: int, seed: int, density: float, power: int, ties: ThresholdTies
) -> None:
    group = ties_group(size, k, seed, density, ties)
    factor = 2.0**power
    wide = dataclasses.replace(
        group,
        bases=[b.to(F32) for b in group.bases or []],
        experts=[[x.to(F32) for x in xs] for xs in group.experts],
    )
    scaled = dataclasses.replace(
        wide,
        bases=[b * factor for b in wide.bases or []],
        experts=[[x * factor for x in xs] for xs in wide.experts],
    )
    plain, _ = run_native(wide, AMPLE)
    large, _ = run_native(scaled, AMPLE)
    assert torch.equal(bits(plain[0] * factor), bits(large[0]))


@given(sizes, counts, seeds, st.sampled_from(list(ThresholdTies)))
def test_density_one_keeps_every_entry(size: int, k: int, seed: int, ties: ThresholdTies) -> None:
    """At density 1 the tie rule is idle, and a density that rounds to n gives the same."""
    full = ties_group(size, k, seed, 1.0, ties)
    nearly = dataclasses.replace(full, rule=dataclasses.replace(full.rule, densities=(1.0 - 1e-16,) * k))
    assert torch.equal(bits(run_native(full, AMPLE)[0][0]), bits(reference_of(full)))
    assert torch.equal(bits(run_native(nearly, AMPLE)[0][0]), bits(reference_of(nearly)))


@given(sizes, counts, seeds, densities, st.sampled_from(list(Scope)), st.sampled_from(list(ThresholdTies)))
def test_a_tensor_cut_in_pieces(
    size: int, k: int, seed: int, density: float, scope: Scope, ties: ThresholdTies
) -> None:
    """In scope MODEL a tensor cut in pieces (names in order) merges as the whole."""
    whole = ties_group(size, k, seed, density, ties, scope=scope)
    assert whole.bases is not None
    cuts = [size // 3, size // 2 - size // 3, size - size // 2]
    names = ["a", "b", "c"]
    rows = [x.split(cuts) for x in whole.experts[0]]
    cut = Group(
        names,
        list(whole.bases[0].split(cuts)),
        [list(xs) for xs in zip(*rows, strict=True)],
        whole.rule,
        [F32] * 3,
        None,
    )
    merged, _ = run_native(cut, AMPLE)
    if scope is Scope.MODEL:
        assert torch.equal(bits(torch.cat(merged)), bits(reference_of(whole)))
    else:
        alone = reference.merge_group(names, cut.bases, cut.experts, cut.rule, cut.out_dtypes)
        assert_same_bits(cut, merged, alone)


def reference_of(group: Group) -> torch.Tensor:
    """The reference's result for a group of one tensor."""
    merged = reference.merge_group(
        group.names, group.bases, group.experts, group.rule, group.out_dtypes, group.cast
    )
    return merged[0]
