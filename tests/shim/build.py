"""Builds the CUDA kernels for the processor, where fibers stand in for threads (fiber.h)."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "bind_cuda.cpp"]
FLAGS = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(folder: Path, extra: Sequence[str] = (), threads: int = 64) -> Path:
    """Compiles the extension into `folder`; `extra`: flags such as those of sanitizers."""
    name = "cuda_shim"
    includes = [str(ROOT / "csrc"), str(ROOT / "tests" / "shim"), pybind11.get_include()]
    includes.append(sysconfig.get_path("include"))
    flags = [*FLAGS, *extra, *(f"-I{path}" for path in includes)]
    flags += [f"-DPM_CUDA_MODULE={name}", f"-DPM_THREADS={threads}"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
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


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), sys.argv[2:]))
