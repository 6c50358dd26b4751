"""The Triton backend against the reference: the same bits, on a GPU if there is one, else interpreted.

The interpreter takes some milliseconds for each program whatever its size, so blocks are large here and cases
small; on a GPU the same tests run, and larger ones besides.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DATA,
    F16,
    F32,
    F64,
    METHODS,
    Case,
    Group,
    bits,
    expected,
    golden_cases,
    outlier_cases,
)
from harness import assert_same_bits
from interpreter import quick_interpreter

from pymerge import merge_tensors
from pymerge.backends import reference, sums
from pymerge.errors import BackendError
from pymerge.rule import Scope, ThresholdTies

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton_harness import DEVICE, INTERPRETED, LENGTH, STREAM, check, run_triton, simple  # noqa: E402

from pymerge.backends import triton as backend  # noqa: E402
from pymerge.backends import triton_tables  # noqa: E402

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter; needs a GPU")
COMBINATIONS = list(itertools.product(METHODS, ["bf16", "f16", "f32"], DATA))
SIZES = (0, 1, 15, 16, 17, 63, 65, 1025, 4095)


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    with quick_interpreter() if INTERPRETED else nullcontext():
        yield


def affordable(case: Case) -> bool:
    """What the interpreter does in about a second; to rescale it goes through rows of 16 elements."""
    if case.method not in ("linear", "task_arithmetic") and case.rescale:
        return case.size * case.k <= 200 and case.k <= 3
    return case.size * case.k <= 100_000 and case.k <= (3 if case.scope is Scope.MODEL else 9)


def chosen_cases() -> list[Case]:
    """Golden cases, all on a GPU, as many as are quick in the interpreter; f64 becomes a type we take."""
    cases = []
    for case in golden_cases() + outlier_cases():
        dtypes = "bf16+f32" if "f64" in case.dtypes else case.dtypes
        cases.append(
            dataclasses.replace(case, dtypes=dtypes, cast=None, out=None if case.out is F64 else case.out)
        )
    if not INTERPRETED:
        return [case for case in cases if case.k <= 17]  # more experts take half a minute to compile
    return [case for case in cases if affordable(case)][::8]


@pytest.mark.parametrize("case", chosen_cases(), ids=lambda case: case.id)
def test_golden_case(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("method", "dtypes", "data"), COMBINATIONS[:: 3 if INTERPRETED else 1])
def test_every_method_type_and_kind_of_data(method: str, dtypes: str, data: str) -> None:
    """Sizes and numbers of experts go round, so that between them every pair comes up."""
    turn = sum(map(ord, method + dtypes + data))
    size, k = SIZES[turn % len(SIZES)], (1, 2, 3, 8)[turn % 4]
    check(simple(method, size, k, dtypes=dtypes, data=data, ties=list(ThresholdTies)[turn % 2]))


@pytest.mark.parametrize("method", METHODS)
def test_many_experts(method: str) -> None:
    check(simple(method, 100, 33))


@pytest.mark.parametrize(
    ("scope", "data", "ties"),
    [
        *itertools.product(Scope, ["realistic", "atom"], ThresholdTies),
        (Scope.TENSOR, "equal", ThresholdTies.FIRST),
        (Scope.MODEL, "nan", ThresholdTies.ALL),
        (Scope.TENSOR, "zero", ThresholdTies.FIRST),
    ],
)
def test_the_one_pass(scope: Scope, data: str, ties: ThresholdTies) -> None:
    report = check(simple("ties", LENGTH, 2, scope=scope, data=data, ties=ties), STREAM)
    assert report.streamed == 1


@pytest.mark.parametrize("ties", ThresholdTies)
@pytest.mark.parametrize("densities", [(0.0, 0.3), (1.0, 0.3), (1e-9, 0.0)])
def test_the_one_pass_where_an_expert_keeps_nothing_or_all(
    densities: tuple[float, ...], ties: ThresholdTies
) -> None:
    group, _ = expected(simple("ties", LENGTH, 2, ties=ties))
    group = dataclasses.replace(group, rule=dataclasses.replace(group.rule, densities=densities))
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    actual, report = run_triton(group, STREAM)
    assert_same_bits(group, actual, merged)
    assert report.streamed == 1


@pytest.mark.parametrize("bias", [0.3, -0.25])
@pytest.mark.parametrize("ties", ThresholdTies)
def test_a_missed_bracket_changes_nothing(ties: ThresholdTies, bias: float) -> None:
    settings = dataclasses.replace(STREAM, bracket_bias=bias)
    report = check(simple("ties", LENGTH, 2, ties=ties), settings)
    assert report.missed == 1, "the bias did not force a miss"


@pytest.mark.parametrize("scope", Scope)
def test_too_little_room_for_the_undecided_changes_nothing(scope: Scope) -> None:
    report = check(simple("ties", LENGTH, 2, scope=scope), dataclasses.replace(STREAM, capacity=16))
    assert report.missed == 1, "the room did not overflow"


@pytest.mark.parametrize("ties", ThresholdTies)
def test_only_the_group_that_missed_goes_again(ties: ThresholdTies) -> None:
    """Two tensors in one wave, of which one leaves nothing undecided and so cannot overflow."""
    loud = simple("ties", LENGTH, 2, ties=ties)
    flat = dataclasses.replace(loud, data="zero")
    one, two = loud.build(), flat.build()
    assert one.bases is not None
    assert two.bases is not None
    group = Group(
        ["a", "b"], [*one.bases, *two.bases], [*one.experts, *two.experts], one.rule, [BF16, BF16], None
    )
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    settings = dataclasses.replace(STREAM, capacity=16)
    actual, report = run_triton(group, settings)
    assert_same_bits(group, actual, merged)
    assert (report.streamed, report.missed) == (2, 1)


@pytest.mark.parametrize("scope", Scope)
def test_the_exact_way(scope: Scope) -> None:
    """Too large for one program, too small to sample."""
    settings = dataclasses.replace(STREAM, one_pass_from=1 << 20)
    report = check(simple("ties", 17_000, 2, data="atom", scope=scope), settings)
    assert report.streamed == 0


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("ties", ThresholdTies)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_outliers_go_the_exact_way(method: str, ties: ThresholdTies, scope: Scope) -> None:
    report = check(simple(method, LENGTH, 2, data="atom", scope=scope, ties=ties), STREAM)
    assert report.streamed == 0


def test_an_empty_tensor_and_density_zero() -> None:
    """Nothing is kept, and of the empty tensor nothing could be."""
    for method, scope in itertools.product(METHODS, Scope):
        case = simple(method, 0, 2, density=0.0, scope=scope, rescale=METHODS[method][4])
        check(case)
        check(dataclasses.replace(case, size=40))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs"])
@pytest.mark.parametrize("data", ["realistic", "inf"])
def test_rescale_adds_up_in_the_order_of_the_contract(
    method: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 64 elements the interpreter sees several of them, the last one short."""
    monkeypatch.setattr(sums, "REDUCTION_BLOCK", 64)
    case = simple(method, 801, 2, data=data, rescale=True, dtypes="f32", density=0.4)
    group = case.build()
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    assert_same_bits(group, run_triton(group)[0], merged)


@needs_gpu
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_rescale_of_large_tensors(method: str) -> None:
    check(simple(method, 300_001, 3, rescale=True), backend.Settings(one_pass_from=100_000))


@needs_gpu
@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 16, 32, 64])
@pytest.mark.parametrize("dtypes", ["bf16", "f32"])
def test_blocks_as_on_a_gpu(dtypes: str, k: int, scope: Scope) -> None:
    case = simple("ties", 1_300_001, k, dtypes=dtypes, scope=scope)
    assert check(case, backend.Settings()).streamed == 1


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear"])
def test_several_tensors_of_several_types(method: str, scope: Scope) -> None:
    """Each in its own type, inputs and outputs, some off alignment, in few launches."""
    case = simple(method, 1, 2, scope=scope, density=0.5)
    sizes = [0, 33, 1, 200, 64, 129]
    g = torch.Generator().manual_seed(5)
    made = [DATA["realistic"](n, 2, g) for n in sizes]
    dtypes = [(BF16, F32, F16)[i % 3] for i in range(len(sizes))]
    outs = [(F32, BF16, F16)[i % 3] for i in range(len(sizes))]
    group = Group(
        [f"t{(i * 5) % 7}" for i in range(len(sizes))],
        [b.to(d) for (b, _), d in zip(made, dtypes, strict=True)] if case.rule.task_vector else None,
        [[x.to(d) for x in xs] for (_, xs), d in zip(made, dtypes, strict=True)],
        case.rule,
        outs,
        None,
    )
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    assert_same_bits(group, run_triton(group, offset=4)[0], merged)
    assert_same_bits(group, run_triton(group)[0], merged)


def test_a_model_of_several_types_in_one_pass() -> None:
    """Scope MODEL: the pieces of both types count towards one threshold."""
    case = simple("ties", 1, 2, scope=Scope.MODEL)
    g = torch.Generator().manual_seed(6)
    made = [DATA["atom"](n, 2, g) for n in (9000, 50, 8193)]
    group = Group(
        ["b", "c", "a"],
        [b.to(d) for (b, _), d in zip(made, (BF16, F32, F32), strict=True)],
        [[x.to(d) for x in xs] for (_, xs), d in zip(made, (BF16, F32, F32), strict=True)],
        case.rule,
        [BF16, F32, BF16],
        None,
    )
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    for settings in (STREAM, dataclasses.replace(STREAM, one_pass_from=1 << 30)):
        assert_same_bits(group, run_triton(group, settings)[0], merged)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    for kind in (InterpretedFunction, JITFunction):

        def run(self: Any, *args: Any, original: Any = kind.run, **kwargs: Any) -> Any:
            launched.append(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)
    return launched


@pytest.mark.parametrize("count", [3, 40 if INTERPRETED else 2000])
def test_many_small_tensors_take_a_handful_of_launches(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = simple("ties", 1, 1, density=0.5)
    g = torch.Generator().manual_seed(7)
    made = [DATA["realistic"](n, 1, g) for n in torch.randint(1, 300, (count,), generator=g).tolist()]
    group = Group(
        [f"layer.{i}" for i in range(count)],
        [b.to(BF16) for b, _ in made],
        [[x.to(BF16) for x in xs] for _, xs in made],
        case.rule,
        [BF16] * count,
        None,
    )
    launched = count_launches(monkeypatch)
    actual, _ = run_triton(group, backend.Settings(block=512))
    assert len(launched) <= 3, launched
    merged = reference.merge_group(group.names, group.bases, group.experts, group.rule, group.out_dtypes)
    assert_same_bits(group, actual, merged)


# -- what is refused ----------------------------------------------------------------------------------------


def test_float64_is_refused() -> None:
    x = torch.zeros(4, dtype=F64, device=DEVICE)
    with pytest.raises(BackendError, match=r"takes no torch\.float64; expected bfloat16") as caught:
        merge_tensors(x, [x.clone()], backend="triton")
    assert "\n" not in str(caught.value)
    with pytest.raises(BackendError, match=r"takes no torch\.float64"):
        merge_tensors(x.float(), [x.float()], backend="triton", out_dtype=F64)


def test_more_experts_than_the_kernels_hold_are_refused() -> None:
    x = torch.zeros(4, device=DEVICE)
    with pytest.raises(BackendError, match="65 experts are more than the 64"):
        merge_tensors(x, [x.clone() for _ in range(65)], backend="triton")


def test_merge_tensors_takes_the_backend() -> None:
    group, merged = expected(simple("ties", 1025, 3, weights="unit", lambda_=1.0))
    assert group.bases is not None
    before = [x.to(DEVICE) for x in (group.bases[0], *group.experts[0])]
    out = merge_tensors(before[0], before[1:], density=0.3, backend="triton")
    assert torch.equal(bits(out.cpu()), bits(merged[0]))


@pytest.mark.skipif(not INTERPRETED, reason="about a machine without a GPU")
def test_tensors_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.zeros(4)
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1") as caught:
        merge_tensors(x, [x.clone()], backend="triton")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("itemsize", "experts", "per"), [(2, 1, 8), (2, 8, 8), (4, 8, 4), (2, 64, 1), (4, 32, 1), (4, 24, 2)]
)
def test_a_thread_reads_16_bytes_while_registers_last(itemsize: int, experts: int, per: int) -> None:
    assert triton_tables.elements_per_thread(itemsize, experts) == per
