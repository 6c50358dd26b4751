"""The CUDA kernels give the reference's bits: as fibers on the processor, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import Case, expected, golden_cases, outlier_cases
from device import SMALL_PARTS, has_kernels, run_device, seed_of
from fibers import build
from harness import assert_same_bits
from short_memory import ShortMemory
from torch import Tensor

from pymerge.backends import cuda
from pymerge.errors import BackendError
from pymerge.rule import Scope

MOST_ELEMENTS = 70_000  # fibers are slow
ALL_CASES = golden_cases() + outlier_cases()
CASES = [case for case in ALL_CASES if case.size <= MOST_ELEMENTS and has_kernels(expected(case)[0])]
STREAMED = [case for case in CASES if case.method == "ties" and case.size > 4 * SMALL_PARTS.samples]
FORCED = {"bracket too low": {"bias": 0.3}, "bracket too high": {"bias": -0.3}, "overflow": {"capacity": 3}}
FORCED |= {"wide bracket": {"sigmas": 40.0}, "narrow bracket": {"sigmas": 0.01}}
SCRIPT = Path(__file__).with_name("fiber_script.py")
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

on_gpu = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden_case_as_fibers(case: Case, fibers: ModuleType) -> None:
    group, merged = expected(case)
    assert_same_bits(group, run_device(group, fibers, seed=seed_of(case)), merged)


@pytest.mark.parametrize("knobs", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.id)
def test_forced_routes(case: Case, knobs: dict[str, float], fibers: ModuleType) -> None:
    group, merged = expected(case)
    parts = dataclasses.replace(SMALL_PARTS, **knobs)  # type: ignore[arg-type]
    assert_same_bits(group, run_device(group, fibers, parts, seed=1), merged)


def test_unknown_types_and_too_many_experts_are_refused(fibers: ModuleType) -> None:
    case = next(case for case in CASES if case.k == 2)
    group, _ = expected(case)
    row = [torch.zeros(3, dtype=torch.float64)] * 3
    with pytest.raises(BackendError, match="tensor 'a': the cuda backend has no kernel for float64"):
        cuda.merge_tensors(["a"], [row], [row[0]], group.rule, kernels=fibers, stream=0)
    many = dataclasses.replace(group.rule, weights=(1.0,) * 65, densities=(1.0,) * 65)
    with pytest.raises(BackendError, match="65 experts, but the cuda backend takes 64"):
        cuda.merge_tensors(["a"], [row], [row[0]], many, kernels=fibers, stream=0)


MIXED = {"dtypes": "bf16+f32", "cast": None, "out": torch.float16}
SHORT = {
    "streamed": next(case for case in STREAMED if case.scope is Scope.TENSOR),
    "several types": dataclasses.replace(STREAMED[0], **MIXED),
    "random": next(case for case in CASES if case.method == "dare_ties" and case.size > 1000),
}


def buffers_of(case: Case) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Inputs, results that hold sevens, and what they should become."""
    group, merged = expected(case)
    bases: list[list[Tensor]] = [[]] * len(merged) if group.bases is None else [[x] for x in group.bases]
    rows = [[*base, *xs] for base, xs in zip(bases, group.experts, strict=True)]
    rows = [[x.to(group.cast or x.dtype).contiguous() for x in row] for row in rows]
    return rows, [torch.full_like(x, 7.0) for x in merged], merged


@pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
def test_too_little_memory_leaves_everything_as_it_was(case: Case, fibers: ModuleType) -> None:
    """Whatever is refused, it is before the first result: so all that is needed was taken by then."""
    group, _ = expected(case)
    rows, outs, merged = buffers_of(case)

    def run(limit: int | None) -> ShortMemory:
        memory = ShortMemory([*itertools.chain(*rows), *outs], limit)
        with memory:
            merge = cuda.merge_tensors
            merge(group.names, rows, outs, group.rule, knobs=SMALL_PARTS, kernels=fibers, stream=0)
        return memory

    peak = run(None).peak
    assert_same_bits(group, outs, merged)
    for x in outs:
        x.fill_(7.0)
    for limit in [peak - 1, *(peak * part // 8 for part in range(8))]:
        with pytest.raises(BackendError, match="the device has too little memory for this merge") as caught:
            run(limit)
        assert "\n" not in str(caught.value)
        assert all((x == 7).all() for x in outs), f"of {peak} bytes, {limit} were allowed"


def test_work_bytes_cover_what_a_merge_takes(fibers: ModuleType) -> None:
    for case in CASES[::7]:
        group, _ = expected(case)
        rows, outs, _ = buffers_of(case)
        if len({x.dtype for row in rows for x in row} | {x.dtype for x in outs}) > 1:
            continue
        with ShortMemory([*itertools.chain(*rows), *outs]) as memory:
            merge = cuda.merge_tensors
            merge(group.names, rows, outs, group.rule, knobs=SMALL_PARTS, kernels=fibers, stream=0)
        counts = [x.numel() for x in outs]
        assert memory.peak <= cuda.work_bytes(counts, group.rule, knobs=SMALL_PARTS, kernels=fibers), case.id


def test_a_device_that_refuses_kernels_leaves_everything_as_it_was(fibers: ModuleType) -> None:
    case = dataclasses.replace(SHORT["streamed"], dtypes="bf16", cast=None, out=None)
    group, merged = expected(case)
    rows, outs, _ = buffers_of(case)
    run = functools.partial(cuda.merge_tensors, group.names, rows, outs, group.rule, kernels=fibers, stream=0)
    fibers.refuse_kernels(True)
    try:
        with pytest.raises(BackendError, match="cannot run on cpu: no kernel image is available"):
            run()
    finally:
        fibers.refuse_kernels(False)
    assert all((x == 7).all() for x in outs)
    run()
    assert_same_bits(group, outs, merged)


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The C++ library too: the sanitizer looks for its functions before Python has loaded it.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(library.strip() for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), SANITIZERS, bf16_only=True)


def test_sanitizers_find_nothing(sanitized: Path) -> None:
    done = run_script(sanitized, "cases")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases agree" in done.stdout


def test_sanitizers_find_a_planted_write_past_the_end(sanitized: Path) -> None:
    done = run_script(sanitized, "write past the end")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_shuffled_schedules_find_a_planted_missing_barrier(sanitized: Path) -> None:
    done = run_script(sanitized, "no barriers")
    assert done.returncode != 0, "kernels without a single barrier gave right results"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.id)
def test_golden_case_on_the_gpu(case: Case) -> None:
    group, merged = expected(case)
    if not has_kernels(group):
        pytest.skip("no kernel for one of its element types")
    for knobs in (SMALL_PARTS, cuda.Knobs()):
        actual = run_device(group, cuda.load_kernels(), knobs, seed=None, device="cuda")
        assert_same_bits(group, actual, merged)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("knobs", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.id)
def test_forced_routes_on_the_gpu(case: Case, knobs: dict[str, float]) -> None:
    group, merged = expected(case)
    parts = dataclasses.replace(SMALL_PARTS, **knobs)  # type: ignore[arg-type]
    assert_same_bits(group, run_device(group, cuda.load_kernels(), parts, seed=None, device="cuda"), merged)
