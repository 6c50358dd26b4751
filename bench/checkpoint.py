"""Merges checkpoints from end to end, side by side: pymerge, the floor, the torch reference, mergekit.

    python -m bench.checkpoint --dir /dev/shm --mergekit VENV/bin/mergekit-yaml
    python -m bench.checkpoint --dir /dev/shm --mergekit VENV/bin/mergekit-yaml --methods all
    python -m bench.checkpoint --mergekit VENV/bin/mergekit-yaml --pymerge-yaml VENV/bin/pymerge-yaml
    python -m bench.checkpoint --dir SOME/DISK --fsync
    python -m bench.checkpoint --linear-cost

Every run is a process of its own: wall time from its start to its end, peak resident memory as the kernel
counted it. Tools take turns; the table shows medians. One row per run goes to bench/results/checkpoint.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.machine import append_rows, describe
from bench.recipes import OURS_ALONE, SETUPS, write_recipe

RESULTS = Path(__file__).parent / "results" / "checkpoint.csv"
# What bench/torch_merge.py merges.
IN_TORCH = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
ALL = "all"
COST_EXPERTS = (2, 4, 8, 16)
# What the command pymerge-yaml is shown with.
DROP_IN = ("ties", "dare_ties", "breadcrumbs_ties", "della", "linear")
SETS = {ALL: tuple(SETUPS), "drop-in": DROP_IN}
FLOOR, OURS, TORCH, MERGEKIT, INSIDE = "floor", "pymerge", "torch reference", "mergekit", "pymerge-yaml"


@dataclass(frozen=True)
class Row:
    """One measurement. `seconds`: the whole process. `inner_seconds`: by the tool's own clock, 0 if none."""

    tool: str
    method: str
    scope: str
    where: str
    fsync: bool
    params: int
    k: int
    run: int
    seconds: float
    inner_seconds: float
    peak_rss_mb: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Task:
    """One merge to be measured with every tool; `models`: the base first."""

    folder: Path
    models: tuple[Path, ...]
    method: str
    scope: str
    density: float
    params: int

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The models that the method reads."""
        return self.models if SETUPS[self.method].base else self.models[1:]

    def recipe(self, ours: bool) -> Path:
        """What the tools merge by, with our own keys only for us."""
        own = {"scope": self.scope} if ours and self.scope != "tensor" else None
        return write_recipe(self.folder / "recipe.yml", self.method, self.models, self.density, own)


# -- running ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one process took, and the JSON it printed ({} if none)."""

    seconds: float
    peak_rss_mb: float
    said: dict[str, float]


def run(command: Sequence[str | Path]) -> Outcome:
    """Runs a process to its end; RuntimeError with the end of its output when it fails.

    Linux counts this process's own memory into its child's peak, so this module imports nothing large.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text = output.read()
        if process.returncode:
            raise RuntimeError(
                f"{command[0]} ended with {process.returncode}:\n{text[-500:]}{errors.read()[-2000:]}"
            )
    said = json.loads(text) if text.startswith("{") else {}
    return Outcome(seconds, usage.ru_maxrss / 1024, said)


def command_of(tool: str, task: Task, given: argparse.Namespace) -> list[str | Path]:
    """The command line that makes `tool` do `task`."""
    module = [sys.executable, "-m"]
    if tool == FLOOR:
        size = output_bytes(task)
        flags = ["--fsync"] if given.fsync else []
        return [*module, "bench.floor", task.out, *task.inputs, "--write", str(size), *flags]
    if tool == TORCH:
        options = ["--method", task.method, "--density", str(task.density), "--scope", task.scope]
        return [*module, "bench.torch_merge", task.out, *task.models, *options]
    if tool in (MERGEKIT, INSIDE):
        command = given.mergekit if tool == MERGEKIT else given.pymerge_yaml
        return [command, task.recipe(ours=False), task.out, "--no-copy-tokenizer", "--quiet"]
    threads = ["--threads", str(given.threads)] if given.threads else []
    return [*module, "pymerge", "merge", task.recipe(ours=True), task.out, "--json", *threads]


def output_bytes(task: Task) -> int:
    """Bytes of the merged weights: as many as the first expert has."""
    return sum(path.stat().st_size for path in task.models[1].glob("*.safetensors"))


def measure(tool: str, task: Task, number: int, given: argparse.Namespace) -> Row:
    """One run of one tool; its output is removed."""
    remove(task.out)
    outcome = run(command_of(tool, task, given))
    remove(task.out)
    read = sum(file.stat().st_size for path in task.inputs for file in path.glob("*.safetensors"))
    return Row(
        tool,
        task.method,
        task.scope,
        "memory" if on_memory(task.folder) else "disk",
        given.fsync or tool == OURS,
        task.params,
        len(task.models) - 1,
        number,
        round(outcome.seconds, 4),
        round(outcome.said.get("seconds", 0.0), 4),
        round(outcome.peak_rss_mb, 1),
        int(outcome.said.get("bytes_read", read)),
        int(outcome.said.get("bytes_written", output_bytes(task))),
    )


def remove(path: Path) -> None:
    """Removes a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def on_memory(folder: Path) -> bool:
    """Whether a folder lies on the memory file system."""
    memory = Path("/dev/shm")
    return memory.exists() and folder.stat().st_dev == memory.stat().st_dev


# -- results ------------------------------------------------------------------------------------------------


def save(rows: Sequence[Row]) -> None:
    """Appends rows to the CSV."""
    append_rows(RESULTS, [vars(row) for row in rows], describe())


def table(rows: Sequence[Row]) -> str:
    """Medians for each tool, beside ours and the floor."""
    heads = ("seconds", "of ours", "of floor", "peak MB")
    lines = [f"{'tool':16}{'method':17}{'scope':8}{'k':>3}" + "".join(f"{head:>10}" for head in heads)]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.scope, row.k, row.params, row.tool), []).append(row)

    def seconds(*key: object) -> float:
        found = groups.get(key)
        return median(row.seconds for row in found) if found else float("nan")

    for (*task, tool), found in groups.items():
        took = seconds(*task, tool)
        ours, floor = took / seconds(*task, OURS), took / seconds(*task, FLOOR)
        peak = max(row.peak_rss_mb for row in found)
        lines.append(
            f"{tool:16}{task[0]:17}{task[1]:8}{task[2]:>3}{took:>10.3f}{ours:>10.2f}{floor:>10.2f}{peak:>10.0f}"
        )
    return "\n".join(lines)


# -- what to measure ----------------------------------------------------------------------------------------


def family(folder: Path, parameters: int, experts: int) -> tuple[tuple[Path, ...], int]:
    """The models of a family made under `folder` (base first), and the parameters of each."""
    size = ["--params", str(parameters), "--experts", str(experts), "--json"]
    said = run([sys.executable, "-m", "bench.family", folder, *size]).said
    return (folder / "base", *(folder / f"expert{k}" for k in range(1, experts + 1))), int(said["parameters"])


def compare(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Every tool on every method and scope; the tools take turns. Saved after each turn: it takes long."""
    models, params = family(given.family or folder / "family", int(given.params), given.experts)
    tools: dict[str, int] = {FLOOR: given.runs, OURS: given.runs}
    tools |= {TORCH: 1} if given.reference else {}
    tools |= {MERGEKIT: 1} if given.mergekit else {}
    tools |= {INSIDE: 1} if given.pymerge_yaml else {}
    rows = []
    for method in SETS.get(given.methods) or given.methods.split(","):
        for scope in given.scopes.split(",") if method == "ties" else ["tensor"]:
            task = Task(folder, SETUPS[method].models(models), method, scope, given.density, params)
            for number in range(given.runs):
                turn = [tool for tool, runs in tools.items() if number < runs]
                if scope == "model" or method in OURS_ALONE:  # mergekit has no such scope or method
                    turn = [tool for tool in turn if tool not in (MERGEKIT, INSIDE)]
                if method not in IN_TORCH and TORCH in turn:
                    turn.remove(TORCH)
                measured = [measure(tool, task, number, given) for tool in turn]
                save(measured)
                rows += measured
    return rows


def linear_cost(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Ours and the floor for K = 2, 4, 8, 16 at three sizes; prints a table of seconds."""
    rows = []
    for size in (int(float(text)) for text in given.sizes.split(",")):
        models, params = family(folder / f"family{size}", size, max(COST_EXPERTS))
        for k in COST_EXPERTS:
            task = Task(folder, models[: k + 1], "ties", "tensor", given.density, params)
            for number in range(given.runs):
                measured = [measure(tool, task, number, given) for tool in (FLOOR, OURS)]
                save(measured)
                rows += measured
        shutil.rmtree(folder / f"family{size}")
    print("seconds" + "".join(f"{f'K = {k}':>10}" for k in COST_EXPERTS))
    for params in dict.fromkeys(row.params for row in rows):
        cells = [
            median(row.seconds for row in rows if (row.tool, row.params, row.k) == (OURS, params, k))
            for k in COST_EXPERTS
        ]
        print(f"{params / 1e6:5.0f} M" + "".join(f"{cell:>10.3f}" for cell in cells))
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Merges checkpoints from end to end, side by side.")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the families are made")
    parser.add_argument("--family", type=Path, help="a family that bench.family made; else one is made")
    parser.add_argument("--params", type=float, default=156e6, help="parameters of one model, at least")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--methods", default="ties", help=f"{' or '.join(SETS)}, or of {','.join(SETUPS)}")
    parser.add_argument("--scopes", default="tensor,model", help="for ties")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="for pymerge")
    parser.add_argument(
        "--fsync", action="store_true", help="the floor flushes its output (pymerge always does)"
    )
    parser.add_argument("--reference", action="store_true", help="also the torch reference, once")
    parser.add_argument(
        "--mergekit", type=Path, help="path of mergekit-yaml 0.1.5, in its own environment; once"
    )
    parser.add_argument("--pymerge-yaml", type=Path, help="path of pymerge-yaml in such an environment; once")
    parser.add_argument(
        "--linear-cost", action="store_true", help="seconds for K = 2, 4, 8, 16 and three sizes"
    )
    parser.add_argument("--sizes", default="20e6,78e6,156e6", help="parameters, for --linear-cost")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    work: Callable[[Path, argparse.Namespace], list[Row]] = linear_cost if given.linear_cost else compare
    with tempfile.TemporaryDirectory(prefix="pymerge-bench-", dir=given.dir) as folder:
        rows = work(Path(folder), given)
    print(table(rows))
    print(", ".join(f"{name} {value}" for name, value in describe().items() if value))


if __name__ == "__main__":
    main()
