"""The Triton backend where memory is short: results stay as they were, and its needs are known before."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from cases import Case, expected
from harness import assert_same_bits
from interpreter import quick_interpreter
from short_memory import ShortMemory

from pymerge.errors import BackendError
from pymerge.rule import Scope, ThresholdTies

pytest.importorskip("triton", reason="triton is not installed")

from triton_harness import INTERPRETED, LENGTH, STREAM, WIDE, simple

from pymerge.backends import triton as backend
from pymerge.backends import triton_memory

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts memory of the processor")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    with quick_interpreter() if INTERPRETED else nullcontext():
        yield


SHORT = {
    "streamed": (simple("ties", LENGTH, 2), STREAM),
    "streamed, all ties": (simple("ties", LENGTH, 2, ties=ThresholdTies.ALL), STREAM),
    "a model": (simple("ties", LENGTH, 2, scope=Scope.MODEL, dtypes="bf16+f32"), STREAM),
    "missed": (simple("ties", LENGTH, 2), dataclasses.replace(STREAM, bracket_bias=0.3)),
    "exact": (simple("ties", 17_000, 2, data="atom"), dataclasses.replace(STREAM, one_pass_from=1 << 20)),
    "small": (simple("ties", 800, 8), WIDE),
    "rescaled": (simple("dare_ties", 150, 2, rescale=True), WIDE),
    "plain": (simple("linear", 5000, 2), WIDE),
}


@pytest.mark.parametrize(("case", "settings"), SHORT.values(), ids=SHORT)
def test_too_little_memory_leaves_everything_as_it_was(case: Case, settings: backend.Settings) -> None:
    """Whatever is refused, it is before the first result: so all that is needed was taken by then."""
    group, merged = expected(case)
    outs = [torch.full_like(x, 7.0) for x in merged]
    inputs = [*(group.bases or []), *itertools.chain(*group.experts)]

    def run(limit: int | None) -> ShortMemory:
        memory = ShortMemory([*inputs, *outs], limit)
        with memory:
            backend.merge_group(group.names, group.bases, group.experts, outs, group.rule, settings)
        return memory

    peak = run(None).peak
    assert_same_bits(group, outs, merged)
    for x in outs:
        x.fill_(7.0)
    for limit in [peak - 1, *(peak * part // 8 for part in range(8))]:
        with pytest.raises(BackendError, match="not enough memory for the merge's work space") as caught:
            run(limit)
        assert "\n" not in str(caught.value)
        assert all((x == 7).all() for x in outs), f"of {peak} bytes, {limit} were allowed"
    run(peak)
    assert_same_bits(group, outs, merged)


@pytest.mark.parametrize("one_pass_from", [1 << 20, 8192])
@pytest.mark.parametrize("case", [simple("ties", LENGTH, 3), simple("dare_ties", 150, 2, rescale=True)])
def test_work_bytes_cover_what_a_merge_takes(
    case: Case, one_pass_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_memory, "ONE_PASS_FROM", one_pass_from)
    group, merged = expected(case)
    outs = [torch.empty_like(x) for x in merged]
    settings = backend.Settings(one_pass_from=one_pass_from)
    with ShortMemory([*(group.bases or []), *itertools.chain(*group.experts), *outs]) as memory:
        backend.merge_group(group.names, group.bases, group.experts, outs, group.rule, settings)
    assert memory.peak <= triton_memory.work_bytes([x.numel() for x in outs], group.rule)
