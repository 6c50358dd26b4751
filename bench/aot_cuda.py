"""What the CUDA kernels become on a GPU, found without one: registers, spills, load widths, instructions.

    python -m bench.aot_cuda            the table for sm_80, sm_90 and sm_100

The number of experts is known only at run time, so one kernel serves every K: `instructions` are those of the
loop over experts, four at a time, for each element and expert, rare branches included. nvcc compiles; the
disassembler is the one in triton's package, or else of the toolkit.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 4  # experts in one turn of the loop
TYPES = {"bf16": ("BF16", 8), "f16": ("F16", 8), "f32": ("F32", 4)}  # and elements of a thread
KERNELS = {
    "stream": "true, Trim::magnitude, true, true, Collect::first",
    "map": "true, Trim::magnitude, true, true",
    "sum": "true, Trim::none, false, false",
}
TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DPM_CUDA", f"-I{ROOT / 'csrc' / 'cuda'}"]


@dataclass(frozen=True)
class Code:
    """One kernel compiled for one target. `stack`: bytes of a thread that do not fit in its registers."""

    kernel: str
    type: str
    target: str
    registers: int
    stack: int
    wide_loads: int
    loads: int
    wide_stores: int
    instructions: float


def disassembler() -> Path | None:
    """cuobjdump, or None where there is none."""
    spec = find_spec("triton")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return bundled
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def compiled(kernel: str, type_: str, target: str) -> Code:
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
    loop = _expert_loop(sass)
    wide = [line for line in loop if "LDG" in line and ".128" in line]
    return Code(
        kernel,
        type_,
        target,
        int(found[1]),
        int(found[2]),
        len(wide),
        sum("LDG" in line for line in loop),
        sum("STG" in line and ".128" in line for line in sass.splitlines()),
        round(len(loop) / (AT_ONCE * per), 2),
    )


def _expert_loop(sass: str) -> list[str]:
    """The shortest loop with a wide load for each of the experts in one turn."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    best: list[str] = []
    for address, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if not jump or int(jump[1], 16) >= address:
            continue
        body = [t for a, t in code if int(jump[1], 16) <= a <= address]
        wide = sum("LDG" in t and ".128" in t for t in body)
        if wide >= AT_ONCE and (not best or len(body) < len(best)):
            best = body
    return best


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(kernels: Sequence[str], types: Sequence[str], targets: Sequence[str]) -> Iterator[Code]:
    """Every combination, compiled when it is asked for."""
    for kernel in kernels:
        for type_ in types:
            for target in targets:
                yield compiled(kernel, type_, target)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("kernel  type  target  registers  stack  16-byte loads  stores  instructions")
    for code in table(list(KERNELS), list(TYPES), TARGETS):
        print(
            f"{code.kernel:<6}  {code.type:<4}  {code.target:<6}  {code.registers:>9}  {code.stack:>5}"
            f"  {code.wide_loads:>6} of {code.loads:<4}  {code.wide_stores:>6}  {code.instructions:>12}",
            flush=True,
        )


if __name__ == "__main__":
    main()
