"""What the CUDA kernels become on a GPU, found without one: registers, spills, load widths, instructions.

    python -m bench.aot_cuda            the table for sm_80, sm_90 and sm_100, and K = 2, 4, 8, 16, 32
    python -m bench.aot_cuda --csv      the same, and written to bench/results/aot_cuda.csv

The number of experts is known only at run time, so one kernel serves every K, and its loop over experts takes
four at a time. `instructions` counts that loop, and what is done once for each element shared out among K
experts. nvcc compiles; the disassembler is the one in triton's package, or else of the toolkit.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from bench.aot_table import RESULTS, Code, shown, version_line, write_csv

ROOT = Path(__file__).parents[1]
AT_ONCE = 4  # experts in one turn of the loop
MOST_EXPERTS = 64
TYPES = {"bf16": ("BF16", 8), "f16": ("F16", 8), "f32": ("F32", 4)}  # and elements of a thread
KERNELS = {
    "stream": "true, Trim::magnitude, true, true, Collect::first",
    "map": "true, Trim::magnitude, true, true",
    "sum": "true, Trim::none, false, false",
}
EXPERTS = (2, 4, 8, 16, 32)
TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DPM_CUDA", f"-I{ROOT / 'csrc' / 'cuda'}"]


def disassembler() -> Path | None:
    """cuobjdump, or None where there is none."""
    spec = find_spec("triton")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return bundled
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


@dataclass(frozen=True)
class Machine:
    """One instantiation's machine code: `loop` as for many experts, `once`: instructions of each element."""

    loop: Code
    once: float

    def for_experts(self, experts: int) -> Code:
        """What an element and expert take when there are so many."""
        return replace(
            self.loop, experts=experts, instructions=round(self.loop.instructions + self.once / experts, 2)
        )


def compiled(kernel: str, type_: str, target: str) -> Machine:
    """Compiles one instantiation of map_pieces and reads its machine code."""
    tool = disassembler()
    assert tool is not None, "no cuobjdump"
    name, per = TYPES[type_]
    shape = f"Shape<{name}, {KERNELS[kernel]}>"
    text = (
        '#include "map.cuh"\n'
        f"template __global__ void pm::cuda::map_pieces<pm::cuda::{shape}>("
        "const __grid_constant__ MapCall);\n"
    )
    text = text.replace(name + ",", f"pm::{name},").replace("Trim::", "pm::Trim::")
    text = text.replace("Collect::", "pm::Collect::").replace("MapCall", "pm::cuda::MapCall")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "one.cu"), Path(folder, "one.cubin")
        source.write_text(text)
        subprocess.run(["nvcc", *FLAGS, f"-arch={target}", "-cubin", "-o", cubin, source], check=True)
        usage = _run(tool, "-res-usage", str(cubin))
        sass = _run(tool, "-sass", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    loop, around = _loops(sass)
    wide = [line for line in loop if "LDG" in line and ".128" in line]
    code = Code(
        kernel,
        type_,
        MOST_EXPERTS,
        target,
        int(found[1]),
        int(found[2]),
        len(wide),
        sum("LDG" in line for line in loop),
        sum("STG" in line and ".128" in line for line in sass.splitlines()),
        round(len(loop) / (AT_ONCE * per), 2),
    )
    return Machine(code, (len(around) - len(loop)) / per)


def _loops(sass: str) -> tuple[list[str], list[str]]:
    """The shortest loop with a wide load for each of the experts in one turn; and the one over elements."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    bodies: list[list[str]] = []
    for address, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            bodies.append([t for a, t in code if int(jump[1], 16) <= a <= address])
    bodies = [body for body in bodies if sum("LDG" in t and ".128" in t for t in body) >= AT_ONCE]
    inner = min(bodies, key=len)
    whole = [body for body in bodies if any("STG" in t and ".128" in t for t in body)]
    return inner, min(whole, key=len)


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(kernels: Sequence[str], types: Sequence[str], targets: Sequence[str]) -> Iterator[Code]:
    """Every combination, compiled when it is asked for, for all numbers of experts."""
    for kernel in kernels:
        for type_ in types:
            for target in targets:
                machine = compiled(kernel, type_, target)
                yield from map(machine.for_experts, EXPERTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", action="store_true", help="write bench/results/aot_cuda.csv as well")
    codes = shown(table(list(KERNELS), list(TYPES), TARGETS))
    if parser.parse_args().csv:
        write_csv(RESULTS / "aot_cuda.csv", codes, {"nvcc": version_line("nvcc", "--version")})
    else:
        for _ in codes:
            pass


if __name__ == "__main__":
    main()
