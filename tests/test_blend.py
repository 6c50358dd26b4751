"""The blends: reference against the oracle and by hand, the core against the reference, bad input."""

from __future__ import annotations

import itertools
import math
import random

import blend_oracle as oracle
import pytest
import torch
from blend_cases import LARGE, SETTINGS, BlendCase, blend_cases, expected, large_cases
from cases import F32, F64, Group, bits
from harness import ISAS, assert_same_bits, run_native

from pymerge import merge_tensors
from pymerge.backends import reference
from pymerge.backends.blend import coefficients
from pymerge.backends.native import Settings
from pymerge.errors import BackendError, CheckpointError, ProblemList, RecipeError
from pymerge.explaining import defaults_in_words, explain
from pymerge.methods import METHODS
from pymerge.presets import Defaults
from pymerge.rule import READ_ONCE, Blend, Rule, Vectors, passes
from pymerge.ruling import rule_for
from pymerge.tensor_backends import Backend, choose_backend

CASES, LARGE_CASES = blend_cases(), large_cases()
THREADS, TILES = (1, 2, 5), (1024, 32768, 131072)
NOT_FOR_ORACLE = ("nan", "inf", "huge", "denormals")  # their sums overflow, or hang on the last subnormal


# -- against the oracle -------------------------------------------------------------------------------------


def oracle_vector(rule: Rule, vectors: list[list[float]]) -> list[float] | None:
    """What the oracle makes of one vector's inputs, without the base."""
    blend = rule.blend
    if blend is None:
        return oracle.times(rule.weights[0], vectors[0])
    if blend.kind is Blend.SLERP:
        return oracle.slerp(vectors[0], vectors[1], blend.t)
    if blend.kind is Blend.NUSLERP:
        return oracle.nuslerp(vectors[0], vectors[1], rule.weights)
    if blend.kind is Blend.MULTISLERP:
        return oracle.multislerp(vectors, rule.weights, rule.normalize, blend.eps)
    if blend.kind is Blend.KARCHER:
        return oracle.karcher(vectors, blend.max_iter, blend.tol)
    return oracle.model_stock(vectors)


def matrix(x: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The vectors of a tensor as rows."""
    vectors = rule.blend.vectors if rule.blend else Vectors.TENSOR
    if vectors is Vectors.ROWS and x.dim():
        return x.flatten(0, -2) if x.dim() > 1 else x[None]
    if vectors is Vectors.COLUMNS and x.dim():
        return x.reshape(x.shape[0], -1).t()
    return x.reshape(1, -1)


@pytest.mark.parametrize("dtypes", ["f64", "f32", "bf16"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.data not in NOT_FOR_ORACLE and c.cast is None], ids=lambda c: c.id
)
def test_agrees_with_the_oracle(case: BlendCase, dtypes: str) -> None:
    case = BlendCase(case.setting, case.shape, dtypes, case.data, out=F64)
    group, merged = expected(case)
    rule = group.rule
    xs = [x.double() for x in group.experts[0]]
    base = group.bases[0].double() if group.bases else torch.zeros(case.shape, dtype=F64)
    if not xs[0].numel():
        return
    deltas = [matrix(x - base, rule) for x in xs]
    unit = 2.0**-53 if dtypes == "f64" else 2.0**-24
    origin = matrix(base, rule)
    for v in range(len(origin)):
        vectors = [d[v].tolist() for d in deltas]
        want = oracle_vector(rule, vectors)
        assert (want is None) == (merged is None)
        if want is None or merged is None:
            return
        gram = [[oracle.dot(a, b) for b in vectors] for a in vectors]
        factors = coefficients(rule, gram) if rule.blend else list(rule.weights)
        assert factors is not None
        got = matrix(merged[0], rule)[v].tolist()
        for i, (g, w, b) in enumerate(zip(got, want, origin[v].tolist(), strict=True)):
            size = abs(b) + math.fsum(abs(c * x[i]) for c, x in zip(factors, vectors, strict=True))
            slack = ((2 * len(xs) + 6) * unit + 1e-11) * size + 1e-300  # 1e-11: cosines that nearly cancel
            assert abs(g - (b + w)) <= slack, (v, i, g, b + w, slack)


# -- by hand ------------------------------------------------------------------------------------------------


def merge(
    method: str, experts: list[list[float]], base: list[float] | None = None, **options: object
) -> list[float]:
    """One f64 tensor merged by the core and by the reference, which must agree."""
    tensors = [torch.tensor(x, dtype=F64) for x in experts]
    origin = None if base is None else torch.tensor(base, dtype=F64)
    got, want = (
        merge_tensors(origin, tensors, method=method, backend=backend, **options)  # type: ignore[arg-type]
        for backend in (None, "reference")
    )
    assert got is not None
    assert want is not None
    assert torch.equal(bits(got), bits(want))
    numbers: list[float] = got.tolist()
    return numbers


def test_slerp_by_hand() -> None:
    third = merge("slerp", [[0.0, 2.0]], [1.0, 0.0], t=1 / 3)
    assert third == pytest.approx([math.sqrt(3) / 2, 1.0])
    assert merge("slerp", [[0.0, 2.0]], [1.0, 0.0], t=0) == [1.0, 0.0]
    assert merge("slerp", [[-2.0, 0.0]], [1.0, 0.0], t=0.25) == [0.25, 0.0]  # opposite: the straight line
    assert merge("slerp", [[0.0, 0.0]], [1.0, 0.0], t=0.5) == pytest.approx([math.sqrt(0.5), 0.0])
    vast = merge("slerp", [[0.0, 1e100]], [1e100, 0.0], t=0.5)
    assert vast == pytest.approx([1e100 * math.sqrt(0.5)] * 2)
    near = math.acos(0.9996)
    assert (
        merge("slerp", [[math.cos(near), math.sin(near)]], [1.0, 0.0], t=0.5)[0] == (1 + math.cos(near)) / 2
    )


def test_nuslerp_by_hand() -> None:
    quarter = [math.sin(3 * math.pi / 8), 2 * math.sin(math.pi / 8)]
    assert merge("nuslerp", [[1.0, 0.0], [0.0, 2.0]], weight=[3, 1]) == pytest.approx(quarter)
    assert merge("nuslerp", [[2.0, 1.0], [1.0, 3.0]], [1.0, 1.0], weight=[3, 1]) == pytest.approx(
        [1 + quarter[0], 1 + quarter[1]]
    )
    assert merge("nuslerp", [[1.0], [3.0]], weight=[1, -1]) == [2.0]  # no sum of weights: the middle
    assert merge("nuslerp", [[1.0, 2.0, 3.0], [-3.0, -6.0, -9.0]], weight=[3, 1]) == [0.0, 0.0, 0.0]


def test_rows_and_columns_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    middle = math.sqrt(0.5)
    rows = merge_tensors(None, [a, b], method="nuslerp", nuslerp_flatten=False)
    assert rows is not None
    assert rows.flatten().tolist() == pytest.approx([1.0, 0.0, middle, middle])
    columns = merge_tensors(None, [a, b], method="nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True)
    # Columns (1, 0) and (1, 1) are 45 degrees apart; (0, 1) and (0, 0) at a right angle.
    part = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    assert columns is not None
    assert columns.flatten().tolist() == pytest.approx([2 * part, 0.0, part, middle])


def test_multislerp_by_hand() -> None:
    """Directions at a right angle with shares 3/4 and 1/4, at the length 3/4 * 1 + 1/4 * 2."""
    want = [1.25 * x / math.sqrt(10) for x in (3, 1)]
    assert merge("multislerp", [[1.0, 0.0], [0.0, 2.0]], weight=[3, 1]) == pytest.approx(want)
    doubled = merge("multislerp", [[1.0, 0.0], [0.0, 2.0]], weight=[1.5, 0.5], normalize_weights=False)
    assert doubled == pytest.approx([2 * x for x in want])
    assert merge("multislerp", [[1.0, 0.0], [-2.0, 0.0]]) == [-0.5, 0.0]
    assert merge("multislerp", [[0.1, 5.0]], [7.0, 7.0], weight=[9]) == [0.1, 5.0]
    eps = merge("multislerp", [[3.0, 0.0], [0.0, 3.0]], eps=0.5)
    assert eps == pytest.approx([3 * math.cos(0.5) * math.sqrt(0.5)] * 2)


def test_karcher_by_hand() -> None:
    """Three axes: the middle of the octant, at the mean length 2."""
    axes = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    assert merge("karcher", axes) == pytest.approx([2 / math.sqrt(3)] * 3)
    assert merge("karcher", axes[:1], axes[1]) == pytest.approx([1.5 * math.sqrt(0.5)] * 2 + [0.0])
    assert merge("karcher", [[1.0, 0.0], [0.0, 0.0]]) == [0.5, 0.0]  # zero counts for the length alone
    assert merge("karcher", [[1.0, 0.0], [-2.0, 0.0]]) == [1.5, 0.0]
    assert merge("karcher", [[0.0, 0.0], [0.0, 0.0]]) == [0.0, 0.0]
    # In a plane the mean of angles 0, 0 and 1 is 1/3.
    plane = merge("karcher", [[1.0, 0.0], [1.0, 0.0], [math.cos(1), math.sin(1)]], tol=1e-12)
    assert plane == pytest.approx([math.cos(1 / 3), math.sin(1 / 3)])


def test_model_stock_by_hand() -> None:
    """Two task vectors at 60 degrees: t = 2 * 0.5 / 1.5."""
    step = [1.0, 0.0], [0.5, math.sqrt(0.75)]
    experts = [[5 + x, 6 + y] for x, y in step]
    assert merge("model_stock", experts, [5.0, 6.0]) == pytest.approx([5 + 0.5, 6 + math.sqrt(0.75) / 3])
    assert merge("model_stock", [[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0]) == [0.0, 0.0]
    assert merge("model_stock", [[1e-4, 0.0], [1e-4, 0.0]], [0.0, 0.0])[0] == pytest.approx(
        2e-4 * 0.01 / 1.01
    )


def test_passthrough_copies_bytes() -> None:
    x = torch.tensor([-0.0, 1.5, math.nan]).view(torch.int32)
    x[2] = 0x7FC12345
    x = x.view(F32)
    assert torch.equal(bits(merge_tensors(None, [x], method="passthrough")), bits(x))
    scaled = merge_tensors(None, [x], method="passthrough", scale=2.0)
    assert scaled.tolist()[:2] == [0.0, 3.0]
    assert bits(scaled)[2] == 0x7FC00000


def test_small_updates_survive_a_large_base() -> None:
    """Relative to a base of 1000, task vectors of 1e-3 keep all the digits that f32 can give the result."""
    base = torch.full((64,), 1000.0)
    experts = [base + 1e-3 * (k + 1) for k in range(2)]
    got = merge_tensors(base, experts, method="model_stock")
    want = base.double() + sum(x.double() - base.double() for x in experts) / 2
    assert torch.equal(got, want.float())


# -- the compiled core --------------------------------------------------------------------------------------


def assert_native_agrees(case: BlendCase, settings: Settings, offset: int = 0) -> None:
    group, merged = expected(case)
    if merged is None:
        with pytest.raises(
            CheckpointError, match="memory: tensor 'x': the weighted directions of the inputs cancel"
        ):
            run_native(group, settings, offset)
        return
    actual, report = run_native(group, settings, offset)
    assert_same_bits(group, actual, merged)
    assert report.elements == math.prod(case.shape)
    if not group.rule.copy:
        assert report.nan_outputs == int(merged[0].isnan().sum())
    inputs = [*group.experts[0], *(group.bases or [])]
    columns = group.rule.blend is not None and group.rule.blend.vectors is Vectors.COLUMNS
    length = case.shape[-1] if "rows" in case.setting and case.shape else math.prod(case.shape)
    if case.shape and not columns and not group.rule.copy:
        assert report.bytes_read == passes(group.rule, length) * sum(x.nbytes for x in inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_core_equals_the_reference(case: BlendCase) -> None:
    rng = random.Random(case.id)
    for isa in ISAS:
        settings = Settings(threads=rng.choice(THREADS), tile=rng.choice(TILES), isa=isa)
        assert_native_agrees(case, settings, rng.choice((0, 0, 8, 24)))


@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.id)
def test_core_equals_the_reference_on_large_tensors(case: BlendCase) -> None:
    """Every ISA with every thread count, and with every tile."""
    for (i, isa), (j, threads) in itertools.product(enumerate(ISAS), enumerate(THREADS)):
        assert_native_agrees(case, Settings(threads=threads, tile=TILES[(i + j) % 3], isa=isa))


def test_every_setting_meets_every_large_shape_and_type() -> None:
    assert {case.setting for case in LARGE_CASES} == set(SETTINGS)
    assert {case.shape for case in LARGE_CASES} >= set(LARGE)


def test_inputs_in_memory_of_any_layout_and_the_last_axis() -> None:
    """Rows are those of the shape, whatever the strides."""
    g = torch.Generator().manual_seed(1)
    base, *experts = (torch.randn(40, 30, 5, generator=g).transpose(0, 2) for _ in range(4))
    merged = merge_tensors(base, experts, method="model_stock", filter_wise=True)
    for i, j in itertools.product(range(5), range(30)):
        alone = merge_tensors(base[i, j], [x[i, j] for x in experts], method="model_stock")
        assert torch.equal(merged[i, j], alone)


def test_the_reference_counts_vectors_as_the_core_does() -> None:
    x = torch.arange(24.0)
    assert reference.vectors_of(x, torch.Size((2, 3, 4)), Vectors.ROWS).shape == (6, 4)
    assert reference.vectors_of(x, torch.Size((2, 3, 4)), Vectors.COLUMNS).tolist()[1] == [1.0, 13.0]
    assert reference.vectors_of(x[:1], torch.Size(()), Vectors.COLUMNS).shape == (1, 1)


# -- rules --------------------------------------------------------------------------------------------------


def test_rules_say_what_is_blended() -> None:
    rule = rule_for(METHODS["nuslerp"], weights=[1, 2], options={"nuslerp_flatten": False})
    assert rule.blend is not None
    assert (rule.blend.vectors, rule.task_vector, rule.weights) == (Vectors.ROWS, False, (1.0, 2.0))
    relative = rule_for(METHODS["multislerp"], weights=[1, 2], has_base=True)
    assert (relative.task_vector, relative.normalize) == (True, True)
    alone = rule_for(METHODS["multislerp"], weights=[3], has_base=True)
    assert (alone.blend, alone.copy, alone.task_vector, alone.weights) == (None, True, False, (1.0,))
    assert rule_for(METHODS["karcher"], weights=[5, 6]).weights == (1.0, 1.0)
    assert rule_for(METHODS["passthrough"], weights=[5], options={"scale": 2.0}).weights == (2.0,)
    assert [passes(relative, n) for n in (READ_ONCE, READ_ONCE + 1)] == [1, 2]


@pytest.mark.parametrize(
    ("method", "count", "options", "sentence"),
    [
        ("slerp", 2, {}, "t must be given"),
        ("slerp", 2, {"t": math.nan}, "t is nan, which is not a finite number in float32"),
        ("slerp", 3, {"t": 0.5}, "slerp takes exactly 2 models, the base among them, found 3"),
        ("nuslerp", 1, {}, "nuslerp takes exactly 2 experts, found 1"),
        ("model_stock", 1, {}, "model_stock takes at least 2 experts, found 1"),
        ("passthrough", 2, {}, "passthrough takes exactly one model, found 2"),
        ("karcher", 0, {}, "karcher needs at least one expert"),
        ("karcher", 2, {"max_iter": 1.5}, "max_iter is 1.5, expected a whole number from 0 to 1,000,000"),
        ("karcher", 2, {"max_iter": -1}, "max_iter is -1, expected a whole number from 0 to 1,000,000"),
        ("karcher", 2, {"tol": -1e-9}, "tol is -1e-09, expected at least 0"),
        ("multislerp", 2, {"eps": -0.5}, "eps is -0.5, expected at least 0"),
        ("multislerp", 2, {"normalize_weights": 1}, "normalize_weights is 1, expected true or false"),
        ("passthrough", 1, {"scale": math.inf}, "scale is inf, which is not a finite number in float32"),
    ],
)
def test_bad_options(method: str, count: int, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rule_for(METHODS[method], weights=[1.0] * count, options=options)
    assert str(caught.value) == sentence


def test_weights_of_multislerp_that_sum_to_zero() -> None:
    with pytest.raises(RecipeError, match="the weights of multislerp sum to 0, so they cannot be normalized"):
        rule_for(METHODS["multislerp"], weights=[1.0, -1.0])
    with pytest.raises(ProblemList):
        rule_for(METHODS["karcher"], weights=[1.0], options={"tol": -1, "max_iter": -1})
    assert rule_for(METHODS["multislerp"], weights=[1.0, -1.0], options={"normalize_weights": False})


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_kernels_on_a_gpu_yet(backend: str) -> None:
    x = torch.zeros(3)
    with pytest.raises(BackendError, match=f"the {backend} backend has no kernels for karcher; the cpu"):
        merge_tensors(None, [x, x], method="karcher", backend=backend)


def test_on_a_gpu_the_reference_computes() -> None:
    rule = rule_for(METHODS["karcher"], weights=[1.0, 1.0])
    assert not rule.has_kernels
    assert choose_backend(None, "cuda:0", rule.has_kernels) is Backend.REFERENCE
    assert choose_backend(None, "cpu", rule.has_kernels) is Backend.CPU


def test_slerp_needs_a_base() -> None:
    x = torch.zeros(3)
    with pytest.raises(RecipeError, match="slerp needs a base: the tensors that t = 0 gives"):
        merge_tensors(None, [x, x], method="slerp", t=0.5)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_directions_that_cancel(backend: str | None) -> None:
    axes = [torch.tensor(x) for x in ([1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0])]
    with pytest.raises(
        CheckpointError, match="tensor 'w': the weighted directions of the inputs cancel, so they"
    ):
        merge_tensors(None, [{"w": x} for x in axes], method="multislerp", backend=backend)


def test_the_list_of_methods_tells_the_parameters() -> None:
    plain = Defaults()
    assert defaults_in_words(METHODS["slerp"], plain) == ["t must be given"]
    assert defaults_in_words(METHODS["multislerp"], plain) == ["normalize_weights true", "eps 1e-08"]
    assert defaults_in_words(METHODS["breadcrumbs"], plain) == [
        "normalize false",
        "density 1",
        "rescale false",
        "scope tensor",
        "threshold_ties first",
        "gamma 0.01",
        "lambda 1",
    ]
    assert "epsilon 0.15" in defaults_in_words(METHODS["della"], plain)


def test_explain_tells_the_parameters() -> None:
    assert "defaults    t must be given" in explain(METHODS["slerp"])
    assert "defaults    max_iter 10, tol 1e-05" in explain(METHODS["karcher"])
    assert "inputs      1 input" in explain(METHODS["passthrough"])
    for name in ("slerp", "karcher", "model_stock"):
        assert "one coefficient for each" in explain(METHODS[name])
        assert "passes      2 (1 for tensors, or rows, of up to 32,768 elements)" in explain(METHODS[name])


def test_a_group_of_tensors_each_has_its_own_coefficients() -> None:
    rule = rule_for(METHODS["karcher"], weights=[1.0] * 3)
    g = torch.Generator().manual_seed(3)
    experts = [[torch.randn(n, generator=g) for _ in range(3)] for n in (5, 40_000, 0, 17)]
    group = Group(["a", "b", "c", "d"], None, experts, rule, [F32] * 4, None)
    merged = reference.merge_group(group.names, None, experts, rule, group.out_dtypes)
    assert_same_bits(group, run_native(group, Settings(threads=2))[0], merged)
