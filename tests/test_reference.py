"""The reference against the f64 oracle, against examples worked out by hand, and against itself."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import oracle
import pytest
import torch
from cases import BF16, DATA, F16, F32, F64, METHODS, Case, Group, bits, golden_cases, outlier_cases
from tolerances import allowed_error

from pymerge.backends import reference
from pymerge.backends.philox import element_words, keep_below, philox4x32, tensor_key
from pymerge.backends.rounding import CANONICAL_NAN, round_to
from pymerge.backends.sums import ordered_sum
from pymerge.rule import Rule, Scope, ThresholdTies, Trim

FIRST, ALL = ThresholdTies.FIRST, ThresholdTies.ALL
ORACLE_SIZES = (0, 1, 15, 17, 33, 64, 200)
FLOATS = (BF16, F16, F32, F64)


def run(group: Group) -> list[torch.Tensor]:
    return reference.merge_group(
        group.names, group.bases, group.experts, group.rule, group.out_dtypes, group.cast
    )


def ties_rule(k: int = 1, **changes: object) -> Rule:
    rule = Rule(True, Trim.MAGNITUDE, True, True, False, (1.0,) * k, (1.0,) * k)
    return dataclasses.replace(rule, **changes)  # type: ignore[arg-type]


def merge_one(
    base: list[float], experts: list[list[float]], rule: Rule, dtype: torch.dtype = F32
) -> list[float]:
    """The merge of one small tensor, given and returned as numbers."""
    bases = [torch.tensor(base, dtype=dtype)] if rule.task_vector else None
    merged = reference.merge_group(
        ["x"], bases, [[torch.tensor(x, dtype=dtype) for x in experts]], rule, [dtype]
    )
    numbers: list[float] = merged[0].tolist()
    return numbers


# -- against the oracle -------------------------------------------------------------------------------------


def oracle_cases() -> list[Case]:
    """The golden cases, made small enough for Python loops; overflow is not the oracle's subject.

    Nor is what cancels to zero in real numbers but to an ulp in f32, which decides a sign.
    """
    sure = [case for case in outlier_cases() if (case.data, case.weights) != ("equal", "negative")]
    return [
        dataclasses.replace(case, size=rng.choice(ORACLE_SIZES), k=min(case.k, 9), cast=None)
        for rng, cases in ((random.Random(3), golden_cases()), (random.Random(4), sure))
        for case in cases
        if case.data != "huge"
    ]


@pytest.mark.parametrize("case", oracle_cases(), ids=lambda case: case.id)
def test_agrees_with_the_oracle(case: Case) -> None:
    group = case.build()
    bases = None if group.bases is None else [b.double().tolist() for b in group.bases]
    experts = [[x.double().tolist() for x in xs] for xs in group.experts]
    merged = run(group)
    inputs = [*group.experts[0], *(group.bases or [])[:1]]
    working = F64 if F64 in {x.dtype for x in inputs} else F32
    unsure = 0
    for actual, elements in zip(merged, oracle.merge(group.names, bases, experts, group.rule), strict=True):
        for got, want in zip(actual.double().tolist(), elements, strict=True):
            unsure += want.unsure
            if want.unsure or not math.isfinite(want.value):
                assert want.unsure or got == want.value or (math.isnan(got) and math.isnan(want.value))
            else:
                slack = allowed_error(want.value, want.size, want.gain, case.k, working, actual.dtype)
                overflows = abs(want.value) + slack > torch.finfo(actual.dtype).max
                assert abs(got - want.value) <= slack or overflows, (got, want, slack)
    assert unsure <= 0.02 * sum(x.numel() for x in merged) + 2


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_equals_the_oracle_where_f32_is_exact(method: str, seed: int) -> None:
    """Small integers, weights of two bits, no division: every step is exact, so nothing may differ."""
    rng = random.Random(seed)
    task_vector, trim, elects, _, _ = METHODS[method]
    k, names = rng.randint(1, 9), ["b", "a.weight", "a"]
    sizes = [rng.randint(0, 90) for _ in names]
    rule = Rule(
        task_vector,
        trim,
        elects,
        False,
        False,
        tuple(rng.choice((1.0, 0.5, -0.75, 0.0, 2.0)) for _ in range(k)),
        tuple(rng.choice((0.0, 0.05, 0.3, 0.5, 1.0)) for _ in range(k)),
        lambda_=rng.choice((1.0, -0.5, 2.0)),
        threshold_ties=rng.choice((FIRST, ALL)),
        scope=rng.choice(list(Scope)),
        seed=seed,
    )
    bases = [[float(rng.randint(-9, 9)) for _ in range(n)] for n in sizes]
    experts = [[[float(rng.randint(-12, 12)) for _ in range(n)] for _ in range(k)] for n in sizes]
    want = oracle.merge(names, bases if task_vector else None, experts, rule)
    merged = reference.merge_group(
        names,
        [torch.tensor(b) for b in bases] if task_vector else None,
        [[torch.tensor(x) for x in xs] for xs in experts],
        rule,
        [F32] * len(names),
    )
    assert [x.tolist() for x in merged] == [[e.value for e in elements] for elements in want]


# -- examples worked out by hand ----------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Half of four: expert 1 keeps +4 and -2, expert 2 keeps -3 and +2."""
    rule = ties_rule(2, densities=(0.5, 0.5))
    experts = [[5.0, -1.0, 2.0, 1.0], [0.0, -2.0, 3.0, 1.5]]
    assert merge_one([1.0] * 4, experts, rule) == [5.0, -1.5, 3.0, 1.0]
    summed = dataclasses.replace(rule, normalize=False)
    assert merge_one([1.0] * 4, experts, summed) == [5.0, -4.0, 3.0, 1.0]


def test_zero_mass_elects_plus_and_zeros_do_not_count() -> None:
    assert merge_one([0.0, 0.0], [[-1.0, 0.0], [1.0, 3.0]], ties_rule(2)) == [1.0, 3.0]


def test_negative_weights_count_with_their_sign() -> None:
    assert merge_one([0.0], [[1.0], [1.0]], ties_rule(2, weights=(1.0, -0.5))) == [1.0]
    # Both entries become negative: num = -1.5, den = -1.5.
    assert merge_one([0.0], [[1.0], [1.0]], ties_rule(2, weights=(-1.0, -0.5))) == [1.0]
    # Opposite weights that agree: v = 1 and 1, den = 0 is replaced by 1.
    assert merge_one([0.0], [[1.0], [-1.0]], ties_rule(2, weights=(1.0, -1.0))) == [2.0]


@pytest.mark.parametrize(
    ("ties", "want"), [(FIRST, [1.0, 2.0, 0.0, 0.0, 0.0]), (ALL, [1.0, 2.0, -1.0, 1.0, 0.0])]
)
def test_equal_magnitudes_at_the_threshold(ties: ThresholdTies, want: list[float]) -> None:
    rule = ties_rule(densities=(0.4,), threshold_ties=ties)
    assert merge_one([0.0] * 5, [[1.0, 2.0, -1.0, 1.0, 0.5]], rule) == want


@pytest.mark.parametrize(
    ("density", "n", "kept"),
    [
        (0.57, 100, 56),
        (0.29, 100, 28),
        (0.2, 4, 1),
        (1e-9, 100, 1),
        (0.0, 100, 0),
        (0.999, 100, 99),
        (1.0, 9, 9),
    ],
)
def test_how_many_are_kept(density: float, n: int, kept: int) -> None:
    values = [float((i * 37) % n + 1) for i in range(n)]
    merged = merge_one([0.0] * n, [values], ties_rule(densities=(density,)))
    assert sorted(x for x in merged if x) == sorted(values)[n - kept :]


def test_nan_is_largest_and_a_trimmed_value_takes_no_part() -> None:
    inf, nan = math.inf, math.nan
    half = ties_rule(densities=(0.5,))
    assert str(merge_one([0.0] * 4, [[1.0, inf, nan, -inf]], half)) == "[0.0, inf, nan, 0.0]"
    assert str(merge_one([0.0] * 2, [[inf, nan]], half)) == "[0.0, nan]"
    assert merge_one([1.0, 2.0], [[inf, nan]], ties_rule(densities=(0.0,))) == [1.0, 2.0]
    assert str(merge_one([0.0], [[inf], [-inf]], ties_rule(2))) == "[nan]"
    assert str(merge_one([0.0], [[nan], [5.0]], ties_rule(2))) == "[nan]"


def test_nans_are_equal_whatever_their_payload() -> None:
    x = torch.tensor([0x7FC00001, -0x00000001, 0x7FFFFFFF, 0x3F800000]).to(torch.int32).view(F32)
    rule = ties_rule(densities=(0.5,))
    merged = reference.merge_group(["x"], [torch.zeros(4)], [[x]], rule, [F32])
    assert bits(merged[0]).tolist() == [0x7FC00000, 0x7FC00000, 0, 0]


@pytest.mark.parametrize(("dtype", "want"), list(CANONICAL_NAN.items()))
def test_nan_leaves_in_one_pattern(dtype: torch.dtype, want: int) -> None:
    x = torch.tensor([-1, 0x7FC12345, -0x003FFFFF], dtype=torch.int32).view(F32)
    rule = Rule(False, Trim.NONE, False, True, False, (1.0,), (1.0,))
    merged = reference.merge_group(["x"], None, [[x]], rule, [dtype])
    assert bits(merged[0]).tolist() == [want] * 3


def test_signs_of_zero() -> None:
    """-0 + 0 is +0: a base of -0 survives only where the merged task vector is -0."""
    plain = merge_one([-0.0], [[-0.0]], ties_rule())
    flipped = merge_one([-0.0], [[-0.0]], ties_rule(lambda_=-1.0))
    assert str(plain + flipped) == "[0.0, -0.0]"
    linear = Rule(False, Trim.NONE, False, False, False, (1.0,), (1.0,))
    assert str(merge_one([], [[-0.0]], linear)) == "[0.0]"


def test_subnormals_are_not_flushed() -> None:
    tiny = 2.0**-149
    assert merge_one([tiny], [[3 * tiny]], ties_rule()) == [3 * tiny]


def test_rescale_restores_the_l1_norm() -> None:
    rule = ties_rule(densities=(0.5,), rescale=True)
    ratio = np.float32(10 / 7)
    assert merge_one([0.0] * 4, [[1.0, 2.0, 3.0, -4.0]], rule) == [0.0, 0.0, 3 * ratio, -4 * ratio]
    assert merge_one([0.0] * 4, [[1e-8, 2e-8, 3e-8, -3e-8]], rule)[2] == np.float32(3e-8)


def test_means_without_weight() -> None:
    rule = ties_rule(2, trim=Trim.NONE, elect=False, weights=(1.0, -1.0))
    assert merge_one([1.0], [[3.0], [2.0]], rule) == [2.0]
    assert merge_one([1.0], [[3.0], [2.0]], dataclasses.replace(rule, weights=(0.0, 0.0))) == [1.0]
    # Electing methods replace only a divisor of exactly 0, the others any below 1e-8.
    tiny = np.float32(2.0**-30)
    assert merge_one([0.0], [[1.0]], ties_rule(weights=(tiny,))) == [1.0]
    assert merge_one([0.0], [[1.0]], ties_rule(trim=Trim.NONE, elect=False, weights=(tiny,))) == [tiny]


def test_sums_run_over_experts_in_order() -> None:
    """2^24 + 1 + 1 is 2^24 one by one in f32, and 2^24 + 2 in any other order."""
    linear = Rule(False, Trim.NONE, False, False, False, (1.0,) * 3, (1.0,) * 3)
    assert merge_one([], [[2.0**24], [1.0], [1.0]], linear) == [2.0**24]
    assert merge_one([], [[1.0], [1.0], [2.0**24]], linear) == [2.0**24 + 2]
    assert merge_one([], [[2.0**24], [1.0], [1.0]], linear, F64) == [2.0**24 + 2]


# -- types --------------------------------------------------------------------------------------------------


def nearest_even(x: float, significant: int, least: int) -> float:
    """`x` to `significant` bits and no finer than 2^least: Python's round() is exact and half to even."""
    ulp = 2.0 ** max(math.frexp(x)[1] - significant, least)
    return round(x / ulp) * ulp


@pytest.mark.parametrize(("dtype", "significant", "least"), [(BF16, 8, -133), (F16, 11, -24)])
def test_f64_is_rounded_once(dtype: torch.dtype, significant: int, least: int) -> None:
    g = torch.Generator().manual_seed(1)
    ordinary = torch.randn(2000, dtype=F64, generator=g) * 2.0 ** torch.randint(-30, 12, (2000,), generator=g)
    halfway = (torch.randint(-255, 256, (2000,), generator=g) + 0.5) * 2.0**-8
    nudge = (
        2.0 ** -torch.randint(28, 45, (2000,), generator=g).to(F64) * torch.randn(2000, generator=g).sign()
    )
    tiny = torch.randn(500, dtype=F64, generator=g) * 2.0 ** (least + 1)
    x = torch.cat([ordinary, halfway.to(F64), halfway + nudge, tiny, torch.zeros(1, dtype=F64)])
    want = [nearest_even(v, significant, least) for v in x.tolist()]
    assert round_to(x, dtype).double().tolist() == want
    far = torch.tensor([math.inf, -math.inf, 1e300, -1e300], dtype=F64)
    assert round_to(far, dtype).tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert round_to(torch.tensor([1e-300, -1e-300], dtype=F64), dtype).tolist() == [0.0, 0.0]


def test_one_f64_input_makes_the_arithmetic_f64() -> None:
    fine = 1 + 2.0**-40
    rule = ties_rule(2)
    base, narrow = torch.zeros(1), torch.zeros(1, dtype=BF16)
    wide = torch.tensor([fine], dtype=F64)
    assert reference.merge_group(["x"], [base], [[narrow, wide]], rule, [F64])[0].item() == fine
    assert reference.merge_group(["x"], [base], [[narrow, wide]], rule, [F64], F32)[0].item() == 1.0


def test_cast_comes_before_arithmetic() -> None:
    """1 + 2^-9 is 1 in bf16: the update is gone before it is subtracted."""
    x = torch.tensor([1 + 2.0**-9])
    rule = ties_rule()
    assert reference.merge_group(["x"], [torch.ones(1)], [[x]], rule, [F32], BF16)[0].item() == 1.0
    assert reference.merge_group(["x"], [torch.ones(1)], [[x]], rule, [F32])[0].item() == x.item()


# -- scope model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [FIRST, ALL])
@pytest.mark.parametrize("data", ["realistic", "atom", "two_values", "nan"])
def test_scope_model_is_one_tensor_in_sorted_name_order(data: str, ties: ThresholdTies) -> None:
    g = torch.Generator().manual_seed(2)
    base, experts = DATA[data](1000, 3, g)
    rule = ties_rule(3, densities=(0.2, 0.5, 0.07), threshold_ties=ties)
    whole = reference.merge_group(["all"], [base.float()], [[x.float() for x in experts]], rule, [F32])[0]
    cuts = [300, 0, 450, 250]
    parts = list(
        zip(
            ["a", "a.b", "b", "c"],
            base.float().split(cuts),
            *(x.float().split(cuts) for x in experts),
            strict=True,
        )
    )
    random.Random(0).shuffle(parts)
    names, bases, *rows = (list(column) for column in zip(*parts, strict=True))
    model = dataclasses.replace(rule, scope=Scope.MODEL)
    merged = reference.merge_group(names, bases, list(zip(*rows, strict=True)), model, [F32] * 4)
    joined = torch.cat([m for _, m in sorted(zip(names, merged, strict=True), key=lambda pair: pair[0])])
    assert torch.equal(bits(joined), bits(whole))


def test_scope_model_compares_f32_with_f64() -> None:
    rule = ties_rule(densities=(0.5,), scope=Scope.MODEL)
    narrow, wide = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0 + 2.0**-45], dtype=F64)
    bases = [torch.zeros(2), torch.zeros(2, dtype=F64)]
    merged = reference.merge_group(["n", "w"], bases, [[narrow], [wide]], rule, [F32, F64])
    assert [m.tolist() for m in merged] == [[3.0, 0.0], [0.0, 3.0 + 2.0**-45]]


# -- sums and random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 4097, 65_535, 65_536, 65_537, 140_001])
def test_ordered_sum_by_plain_loops(n: int) -> None:
    values = (np.random.default_rng(n).standard_t(2, n) ** 2).tolist()
    total = 0.0
    for begin in range(0, n, 65_536):
        lanes = [0.0] * 16
        for i, value in enumerate(values[begin : begin + 65_536]):
            lanes[i % 16] += value
        block = 0.0
        for lane in lanes:
            block += lane
        total += block
    assert ordered_sum(torch.tensor(values, dtype=F64)).item() == total


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], want: str) -> None:
    words = philox4x32(np.array(counter, dtype=np.uint32).reshape(4, 1), (key[0], key[1]))
    assert " ".join(f"{word:08x}" for word in words[:, 0]) == want


def test_words_belong_to_seed_name_expert_and_index() -> None:
    name, seed = "model.läyers.0", 2**40 + 7
    words = element_words(tensor_key(seed, name), 5, 23)
    assert words.tolist() == [oracle.random_word(seed, name, i, 5) for i in range(23)]
    assert element_words(tensor_key(seed, name), 5, 0).size == 0
    variants = {(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)}
    assert len({tuple(element_words(tensor_key(s, n), e, 4).tolist()) for s, n, e in variants}) == len(
        variants
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_trim_keeps_about_its_density(density: float) -> None:
    n = 100_000
    kept = int((element_words(tensor_key(0, "x"), 0, n) < keep_below(density)).sum())
    assert abs(kept - density * n) < 5 * math.sqrt(n * density * (1 - density))


# -- manners ------------------------------------------------------------------------------------------------


def test_shapes_are_kept_and_inputs_are_not_touched() -> None:
    g = torch.Generator().manual_seed(4)
    base = torch.randn(3, 1, 5, generator=g)
    experts = [torch.randn(5, 1, 3, generator=g).transpose(0, 2) for _ in range(2)]
    before = [base.clone(), *(x.clone() for x in experts)]
    rule = ties_rule(2, densities=(0.4, 0.7), rescale=True)
    merged = reference.merge_group(
        ["x", "s"], [base, base[0, 0, 0]], [experts, [x[0, 0, 0] for x in experts]], rule, [F32, F32]
    )
    assert [m.shape for m in merged] == [(3, 1, 5), ()]
    assert all(torch.equal(x, y) for x, y in zip([base, *experts], before, strict=True))
    assert reference.merge_group([], [], [], rule, []) == []


def test_a_group_that_does_not_fit_its_rule_is_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="task_vector=True"):
        reference.merge_group(["x"], None, [[x]], ties_rule(), [F32])
    with pytest.raises(ValueError, match="'x' has 2 experts, the rule 1 weights"):
        reference.merge_group(["x"], [x], [[x, x]], ties_rule(), [F32])
    with pytest.raises(ValueError, match="2 names came with 1 lists"):
        reference.merge_group(["x", "y"], [x], [[x]], ties_rule(), [F32])
