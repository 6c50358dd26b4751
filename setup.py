"""Builds the compiled core, and the CUDA kernels where there are nvcc and a card; else see pyproject.toml.

PYMERGE_CUDA=90 builds the CUDA kernels for that architecture whatever cards there are, 90,100 for both, all
for every one that is supported; 0 leaves them out. One architecture takes minutes of compiling.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.modified import newer_group

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
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC", "-DPM_CUDA"]
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
OLDEST = int(ARCHITECTURES[0])
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))


def sources(*folders):
    return sorted(str(path) for folder in folders for path in Path(folder).glob("*.cpp"))


def toolkit():
    """The folder of the CUDA toolkit; the nvcc that is found first may be a script that calls another."""
    if not shutil.which("nvcc"):
        return None
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def named_architectures(text):
    """All, or such as 90 or 90,100; ascending, for the newest comes last."""
    numbers = ARCHITECTURES if text == "all" else text.split(",")
    # Older ones lack the reductions over a warp that the kernels use.
    if not all(re.fullmatch(r"[1-9]\d{1,2}", number) and int(number) >= OLDEST for number in numbers):
        sys.exit(
            f"PYMERGE_CUDA is {text!r}, expected 0, all, or architectures from {OLDEST} on, such as 90,100"
        )
    if toolkit() is None:
        sys.exit(
            f"PYMERGE_CUDA is {text!r}, but no nvcc is on the PATH; install the CUDA toolkit, or set it to 0"
        )
    return sorted(set(numbers), key=int)


def architectures():
    """What the environment asks for, else the architectures of this machine's cards."""
    chosen = os.environ.get("PYMERGE_CUDA", "")
    if chosen:
        return [] if chosen == "0" else named_architectures(chosen)
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {int(number.replace(".", "")) for number in re.findall(r"^\d+\.\d$", said, re.MULTILINE)}
    # A newer card of the same generation runs what its oldest relative does; an older card runs nothing here.
    nearest = {max((n for n in map(int, ARCHITECTURES) if n <= card), default=0) for card in found}
    return [str(number) for number in sorted(nearest - {0})]


def architecture_flags(numbers):
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    newest = numbers[-1]  # as an intermediate language too, for what comes after it
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class Build(build_ext):
    """Has nvcc compile the kernels of an extension before the rest of it is built."""

    def build_extension(self, extension):
        if extension.name == "pymerge._cuda":
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                extension.extra_objects = list(pool.map(self.compile_kernel, Path("csrc/cuda").glob("*.cu")))
        super().build_extension(extension)

    def compile_kernel(self, source):
        flags = [*CUDA_FLAGS, *architecture_flags(architectures())]
        # Named after its flags, so that objects for other architectures are not taken for these.
        target = Path(
            self.build_temp, f"{source.stem}-{'-'.join(re.findall(r'sm_([0-9]+)', ' '.join(flags)))}.o"
        )
        if self.force or newer_group([str(source), "setup.py", *HEADERS], str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["nvcc", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)


extensions = [
    Pybind11Extension(
        "pymerge._core",
        [*sources("csrc/cpu", "csrc/stream"), "csrc/bind.cpp"],
        depends=HEADERS,
        cxx_std=20,
        extra_compile_args=FLAGS,
    )
]
if architectures() and (top := toolkit()) is not None:
    extensions.append(
        Pybind11Extension(
            "pymerge._cuda",
            ["csrc/bind_cuda.cpp"],
            depends=[*HEADERS, *map(str, Path("csrc/cuda").glob("*.cu"))],
            cxx_std=20,
            define_macros=[("PM_CUDA", None), ("PM_CUDA_MODULE", "_cuda")],
            include_dirs=[str(path) for path in (*top.glob("targets/*/include"), top / "include")],
            library_dirs=[str(path) for path in (*top.glob("targets/*/lib"), top / "lib64")],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            extra_compile_args=FLAGS,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
