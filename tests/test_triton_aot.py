"""What the Triton kernels compile to, without a GPU: no spills, wide loads, few instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = ("sm_80", "sm_90", "sm_100")
# Instructions of the main loop for each element and model: the most that passes, and what triton 3.6.0 gave
# on sm_80, sm_90, sm_100 and gfx942. Division, rounding and marks are per element, so K = 2 pays more.
BUDGETS = {
    ("stream", "bf16", 2): 38.0,  # 35.8, 35.8, 33.9, 32.4
    ("stream", "bf16", 8): 23.0,  # 21.5, 21.5, 19.9, 21.7
    ("stream", "f32", 2): 36.0,  # 33.4, 33.1, 30.8, 33.2
    ("stream", "f32", 8): 22.5,  # 19.9, 20.0, 19.4, 21.6
    ("map_pieces", "bf16", 2): 33.0,  # 30.5, 30.4, 28.9, 26.9
    ("map_pieces", "bf16", 8): 20.0,  # 18.2, 18.1, 16.5, 16.9
    ("map_pieces", "f32", 2): 30.0,  # 27.1, 27.1, 25.8, 26.0
    ("map_pieces", "f32", 8): 19.0,  # 17.3, 17.3, 15.8, 16.3
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, int, str], dict[str, Any]]:
    """Every kernel for every target, compiled by a process of its own, in which triton does not interpret."""
    run = aot("--json", "--experts", "2", "8")
    rows = [json.loads(line) for line in run.splitlines()]
    return {(row["kernel"], row["type"], row["experts"], row["target"]): row for row in rows}


def aot(*arguments: str) -> str:
    """What `python -m bench.aot` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench.aot", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
@pytest.mark.parametrize(("kernel", "type_", "experts"), BUDGETS)
def test_machine_code(
    compiled: dict[tuple[str, str, int, str], dict[str, Any]],
    kernel: str,
    type_: str,
    experts: int,
    target: str,
) -> None:
    code = compiled[kernel, type_, experts, target]
    assert code["stack"] == 0, "registers spill"
    assert code["wide_loads"] == code["loads"] == experts + 1, "an input is not read 16 bytes at a time"
    assert code["wide_stores"] == 1, "the output is not written 16 bytes at a time"
    assert code["instructions"] <= BUDGETS[kernel, type_, experts]


@pytest.mark.slow
@pytest.mark.parametrize(("type_", "target"), [("bf16", "sm_90"), ("f32", "sm_100")])
def test_32_experts_spill_nothing(type_: str, target: str) -> None:
    run = aot("--json", "--kernel", "stream", "--experts", "32", "--type", type_, "--target", target)
    assert json.loads(run)["stack"] == 0


@pytest.mark.slow
def test_the_most_experts_compile() -> None:
    """Their values do not fit in registers any more, but they run."""
    run = aot("--json", "--kernel", "stream", "--experts", "64", "--type", "bf16", "--target", "sm_90")
    assert json.loads(run)["experts"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles(target: str) -> None:
    """The interpreter takes much that the compiler refuses."""
    assert "select_small" in aot("--every", "--target", target)
