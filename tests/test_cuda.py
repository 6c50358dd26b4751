"""The CUDA kernels give the reference's bits: as fibers on the processor, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import Case, expected, golden_cases
from device import SMALL_PARTS, has_kernels, run_device, seed_of
from fibers import build, load
from harness import assert_same_bits

from pymerge.backends import cuda
from pymerge.errors import BackendError

MOST_ELEMENTS = 70_000  # fibers are slow
CASES = [case for case in golden_cases() if case.size <= MOST_ELEMENTS and has_kernels(expected(case)[0])]
STREAMED = [case for case in CASES if case.method == "ties" and case.size > 4 * SMALL_PARTS.samples]
FORCED = {"bracket too low": {"bias": 0.3}, "bracket too high": {"bias": -0.3}, "overflow": {"capacity": 3}}
FORCED |= {"wide bracket": {"sigmas": 40.0}, "narrow bracket": {"sigmas": 0.01}}
SCRIPT = Path(__file__).with_name("fiber_script.py")
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

on_gpu = pytest.mark.skipif(cuda.available() is not None, reason=str(cuda.available()))


@pytest.fixture(scope="session")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load(build(tmp_path_factory.mktemp("shim")))


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


@on_gpu
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.id)
def test_golden_case_on_the_gpu(case: Case) -> None:
    group, merged = expected(case)
    if not has_kernels(group):
        pytest.skip("no kernel for one of its element types")
    for knobs in (SMALL_PARTS, cuda.Knobs()):
        actual = run_device(group, cuda.load_kernels(), knobs, seed=None, device="cuda")
        assert_same_bits(group, actual, merged)


@on_gpu
@pytest.mark.parametrize("knobs", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.id)
def test_forced_routes_on_the_gpu(case: Case, knobs: dict[str, float]) -> None:
    group, merged = expected(case)
    parts = dataclasses.replace(SMALL_PARTS, **knobs)  # type: ignore[arg-type]
    assert_same_bits(group, run_device(group, cuda.load_kernels(), parts, seed=None, device="cuda"), merged)
