"""What the Triton kernels become on a GPU, found without one, by compiling ahead of time.

    python -m bench.aot            the table, for K = 2, 4, 8, 16, 32
    python -m bench.aot --csv      the same, and written to bench/results/aot_triton.csv
    python -m bench.aot --json     the same, one JSON object per line

The disassemblers are those in triton's own package.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot_table import RESULTS, Code, shown, version_line, write_csv
from pymerge.backends.triton_tables import THREADS, elements_per_thread
from pymerge.kernels import map as kernels
from pymerge.kernels import select, stats

EXPERTS = (2, 4, 8, 16, 32)
TYPES = {"bf16": tl.bfloat16, "f32": tl.float32}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"numbers": "*fp32", "marks": "*u8", "tallies": "*i32", "owners": "*i32"}
F64_SUMS = {"sums": "*fp64", "results": "*fp64"}
ALIGNED = [["tt.divisibility", 16]]


def build(function: Any, constants: Mapping[str, Any], target: str) -> Any:
    """What triton makes of a kernel whose other arguments are pointers to tables."""
    names = function.arg_names
    pointers = POINTERS | (F64_SUMS if function.__name__ in ("masses", "add_up") else {})
    if function.__name__ == "count_equal":
        pointers = pointers | {"tallies": "*i64"}
    source = ASTSource(
        fn=function,
        signature={n: "constexpr" if n in constants else pointers.get(n, "*i64") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): ALIGNED for i, n in enumerate(names) if n not in constants},
    )
    gpu = TARGETS[target]
    options = {"num_warps": THREADS // gpu.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=gpu, options=options)


def every_kernel() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Specialisations of all kernels, so that no user is the first to compile one."""
    one = {"K": 3, "IN": tl.float16, "OUT": tl.bfloat16, "BLOCK": 1024}
    formula = {"ELECT": True, "NORMALIZE": True, "UNIT": False, "LATE": False}
    ragged = one | formula | {"RAGGED": True}
    for trim in (0, 1, 2, 3):
        for base in (True, False):
            options = ragged | {"TRIM": trim, "BASE": base, "ELECT": base}
            yield f"map_pieces trim {trim} base {base}", kernels.map_pieces, options
    for all_ties in (True, False):
        yield f"stream all {all_ties}", kernels.stream, ragged | {"ALL": all_ties, "PER": 8}
    rows = {"K": 3, "OUT": tl.float16, "KIND": 1, "BLOCK": 512}
    yield "fix_up", kernels.fix_up, rows | formula
    late = {"LATE": True}
    yield "map_pieces late", kernels.map_pieces, ragged | {"TRIM": 1, "BASE": True} | late
    yield "stream late", kernels.stream, ragged | {"ALL": False, "PER": 8} | late
    yield "fix_up late", kernels.fix_up, rows | formula | late
    yield "list_undecided", stats.list_undecided, {"BLOCK": 1024}
    yield "gather", stats.gather, {"K": 3, "IN": tl.bfloat16, "KIND": 0, "BLOCK": 1024}
    yield "spread", stats.spread, {"K": 3, "BLOCK": 1024}
    for trim in (1, 2, 3):
        options = {"K": 3, "IN": tl.bfloat16, "TRIM": trim, "ROWS": 4096, "WIDE": 8}
        yield f"masses trim {trim}", stats.masses, options
    yield "add_up", stats.add_up, {"K": 3}
    search = {"K": 3, "IN": tl.float32, "BLOCK": 1024}
    for listed in (True, False):
        some = search | {"BASE": not listed, "WITHIN": listed}
        yield f"count_digits listed {listed}", select.count_digits, some | {"SHIFT": 11}
        yield f"count_equal listed {listed}", select.count_equal, some
        yield f"place_ties listed {listed}", select.place_ties, some | {"KIND": 2, "LISTED": listed}
    yield "settle_digit", select.settle_digit, {"FIRST": True}
    yield "select_small", select.select_small, search


def compiled(kernel: str, type_: str, experts: int, target: str) -> Code:
    """`kernel`: "stream" or "map_pieces", of whole pieces, for ties with unit weights."""
    function = getattr(kernels, kernel)
    per = elements_per_thread(4 if type_ == "f32" else 2, experts)
    constants: dict[str, Any] = {
        "K": experts,
        "IN": TYPES[type_],
        "OUT": TYPES[type_],
        "RAGGED": False,
        "ELECT": True,
        "NORMALIZE": True,
        "UNIT": True,
        "LATE": False,
        "BLOCK": per * THREADS,
    }
    more = {"ALL": False, "PER": per} if kernel == "stream" else {"BASE": True, "TRIM": 1}
    constants.update(more)
    made = build(function, constants, target)
    gpu = TARGETS[target]
    read = _amd(made.asm["amdgcn"]) if gpu.backend == "hip" else _nvidia(made.asm["cubin"])
    registers, stack, loop = read
    return Code(
        kernel,
        type_,
        experts,
        target,
        registers,
        stack,
        sum(bool(re.match(r"LDG\.E\..*128|global_load_dwordx4", op)) for op in loop),
        sum(bool(re.match(r"LDG|global_load", op)) for op in loop),
        sum(bool(re.match(r"STG\.E\..*128|global_store_dwordx4", op)) for op in loop),
        round(len(loop) / (per * experts), 2),
    )


def _nvidia(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack and the main loop's operations."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        text = _run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    lines = re.findall(
        r"^\s*\.(L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*)", text, re.M
    )
    jumps = [(label, op, re.search(r"\((\.?L_x_\d+)\)", rest)) for label, op, rest in lines]
    code = [(label, op, to[1].lstrip(".") if to and op.startswith("BRA") else "") for label, op, to in jumps]
    return int(found[1]), int(found[2]), _main_loop(code)


def _amd(text: str) -> tuple[int, int, list[str]]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert registers is not None
    assert scratch is not None
    lines = re.findall(r"^(?:\.?(LBB\w+):|\t([a-z]+_\w+)[ \t]*([^;\n]*))", text, re.M)
    code = [(label, op, rest.strip().lstrip(".") if "branch" in op else "") for label, op, rest in lines]
    return int(registers[1]), int(scratch[1]), _main_loop(code)


def _main_loop(code: Sequence[tuple[str, str, str]]) -> list[str]:
    """The operations that the longest backward jump spans; `code`: label, operation, where it jumps to."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    best: list[str] = []
    for label, operation, to in code:
        if label:
            labels[label] = len(operations)
            continue
        operations.append(operation)
        if to in labels and len(operations) - labels[to] > len(best):
            best = operations[labels[to] :]
    return best


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def table(
    kernels_: Sequence[str], types: Sequence[str], experts: Sequence[int], targets: Sequence[str]
) -> Iterator[Code]:
    """Every combination, compiled when it is asked for."""
    for kernel in kernels_:
        for type_ in types:
            for k in experts:
                for target in targets:
                    yield compiled(kernel, type_, k, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--csv", action="store_true", help="write bench/results/aot_triton.csv as well")
    parser.add_argument("--kernel", nargs="+", default=["stream", "map_pieces"])
    parser.add_argument("--type", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--experts", nargs="+", type=int, default=list(EXPERTS))
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--every", action="store_true", help="only compile every kernel once for each target")
    options = parser.parse_args()
    if options.every:
        for name, function, constants in every_kernel():
            for target in options.target:
                build(function, constants, target)
                print(f"{name}: {target}", flush=True)
        return
    codes = table(options.kernel, options.type, options.experts, options.target)
    if options.json:
        for code in codes:
            print(json.dumps(asdict(code)), flush=True)
    elif options.csv:
        write_csv(RESULTS / "aot_triton.csv", shown(codes), tools())
    else:
        for _ in shown(codes):
            pass


def tools() -> dict[str, str]:
    """Versions of what compiles: sm_100 has an assembler of its own."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    assemblers = {name: folder / name for name in ("ptxas", "ptxas-blackwell")}
    versions = {name: version_line(str(path), "--version") for name, path in assemblers.items()}
    return {"triton": triton.__version__, **versions}


if __name__ == "__main__":
    main()
