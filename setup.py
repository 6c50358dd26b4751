"""Builds the compiled core; everything else stands in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile(default=0).install()

# Contraction would fuse a rounding away and break the promise of equal bits on every processor.
FLAGS = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]

core = Pybind11Extension(
    "pymerge._core",
    sorted(
        str(path) for folder in ("csrc", "csrc/cpu", "csrc/stream") for path in Path(folder).glob("*.cpp")
    ),
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    cxx_std=20,
    extra_compile_args=FLAGS,
)

setup(ext_modules=[core])
