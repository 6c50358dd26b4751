"""For which architectures setup.py builds the CUDA kernels, and what it says of a wrong choice."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from pybind11.setup_helpers import ParallelCompile

ROOT = Path(__file__).parents[1]
NVCC = 'echo "#$ TOP=/opt/cuda" >&2'
SMI = 'echo "{}"'


@pytest.fixture
def architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Calls the function of setup.py where only the given programs are installed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(ParallelCompile, "install", lambda self: None)

    def call(chosen: str = "", **programs: str) -> list[str]:
        for name, script in programs.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + "/nowhere")
        monkeypatch.setenv("PYMERGE_CUDA", "0")  # while setup.py itself runs
        found = runpy.run_path("setup.py")["architectures"]
        monkeypatch.setenv("PYMERGE_CUDA", chosen)
        made: list[str] = found()
        return made

    return call


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ("9.0", ["90"]),
        ("9.0\n9.0", ["90"]),
        ("12.0\n8.0", ["80", "120"]),
        ("8.7", ["86"]),
        ("10.3", ["100"]),
        ("7.5", []),
        ("no devices were found", []),
    ],
)
def test_the_cards_that_are_there(
    cards: str, expected: list[str], architectures: Callable[..., list[str]]
) -> None:
    assert architectures(nvcc=NVCC, nvidia_smi=SMI.format(cards)) == expected


def test_no_cards_and_a_driver_that_does_not_answer(architectures: Callable[..., list[str]]) -> None:
    assert architectures(nvcc=NVCC) == []
    assert architectures(nvcc=NVCC, nvidia_smi="echo 9.0 >&2; exit 9") == []


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("0", []),
        ("90", ["90"]),
        ("100,90", ["90", "100"]),
        ("90,90", ["90"]),
        ("all", ["80", "86", "89", "90", "100", "120"]),
    ],
)
def test_what_is_asked_for(chosen: str, expected: list[str], architectures: Callable[..., list[str]]) -> None:
    assert architectures(chosen, nvcc=NVCC, nvidia_smi=SMI.format("8.0")) == expected


@pytest.mark.parametrize("chosen", ["yes", "sm_90", "9.0", "75", "90,", " 90", "90;100", "1"])
def test_anything_else_is_refused(chosen: str, architectures: Callable[..., list[str]]) -> None:
    with pytest.raises(SystemExit, match=r"PYMERGE_CUDA is .*, expected 0, all, or architectures") as caught:
        architectures(chosen, nvcc=NVCC)
    assert repr(chosen) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chosen", ["90", "all"])
def test_kernels_that_cannot_be_built_are_not_left_out_silently(
    chosen: str, architectures: Callable[..., list[str]]
) -> None:
    with pytest.raises(SystemExit, match=f"PYMERGE_CUDA is '{chosen}', but no nvcc is on the PATH"):
        architectures(chosen)
