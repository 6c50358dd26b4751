"""The benchmark of GPUs runs through on a machine without one, so that on one only the times are new."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parent.parent


def rehearse(*arguments: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_table(tmp_path: Path) -> None:
    rehearse("--runs", "1", "--csv", str(tmp_path / "gpu.csv"))
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    tools = {row["tool"] for row in rows}
    assert {"copy", "cpu", "triton", "torch eager, topk", "triton: 3 tensors, a loop"} <= tools
    assert "files, cpu, second run" in tools
    assert all(row["same_bits"] in ("", "True") for row in rows)


def test_the_check() -> None:
    assert "small cases agree" in rehearse("--check", "bf16", "f32")


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)
