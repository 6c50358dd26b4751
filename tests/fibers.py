"""Builds the CUDA kernels for the processor, where fibers stand in for threads (shim/fiber.h)."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bind_cuda.cpp"]
FLAGS = [
    "-std=c++20",
    "-g",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def build(folder: Path, extra: Sequence[str] = ("-O1",), *, bf16_only: bool = False) -> Path:
    """Compiles the extension into `folder`; `extra`: flags such as those of sanitizers."""
    sources = [path for path in SOURCES if not bf16_only or path.stem not in ("merge_f16", "merge_f32")]
    name = "cuda_shim"
    includes = [str(ROOT / "csrc"), str(ROOT / "tests" / "shim"), pybind11.get_include()]
    includes.append(sysconfig.get_path("include"))
    flags = [*FLAGS, *extra, *(f"-I{path}" for path in includes)]
    flags += [f"-DPM_CUDA_MODULE={name}", "-DPM_THREADS=64"]
    flags += ["-DPM_BF16_ONLY"] if bf16_only else []

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / f"{name}.so"
    subprocess.run(["g++", "-shared", *extra, *map(str, objects), "-o", str(module)], check=True)
    return module


def load(module: Path) -> ModuleType:
    """Imports a module that `build` made."""
    loader = ExtensionFileLoader(module.stem, str(module))
    spec = spec_from_loader(module.stem, loader)
    assert spec
    loaded = module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
