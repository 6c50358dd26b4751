"""In-memory benchmark: one tensor, K experts, TIES with thresholds included, beside roofline and other tools.

Everything takes turns within one run, so that a busy neighbour slows all alike; medians are compared.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.machine import describe
from pymerge.backends.native import NativeRun, Settings
from pymerge.backends.reference import merge_group
from pymerge.dtypes import BY_TORCH_NAME
from pymerge.job import Region, TensorJob
from pymerge.methods import METHODS
from pymerge.rule import Rule, Scope, ThresholdTies
from pymerge.ruling import rule_for
from pymerge.tensor_backends import LIST_SHARE

HERE = Path(__file__).parent


def make_inputs(count: int, experts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """A base (normal, deviation 0.02) and experts (Student's t, 3 degrees of freedom; a third untouched)."""
    draw = torch.Generator().manual_seed(0)
    base = (torch.randn(count, generator=draw) * 0.02).to(dtype)
    tensors = [base]
    for _ in range(experts):
        chi = sum(torch.randn(count, generator=draw).square() for _ in range(3))
        update = torch.randn(count, generator=draw) / (chi / 3).sqrt() * 5e-4
        update[torch.rand(count, generator=draw) < 1 / 3] = 0
        tensors.append((base.float() + update).to(dtype))
    return tensors


class Ours:
    """Times the compiled core; `given` reuses thresholds, so that only the merge step is measured."""

    def __init__(self, tensors: list[torch.Tensor], rule: Rule, threads: int) -> None:
        self.out = torch.zeros_like(tensors[0])
        regions = [Region(BY_TORCH_NAME[str(t.dtype)[6:]], t.data_ptr()) for t in (*tensors, self.out)]
        self.job = TensorJob("", tensors[0].numel(), regions[0], tuple(regions[1:-1]), regions[-1], rule)
        memory = max(Settings.memory, sum(t.nbytes for t in tensors) // LIST_SHARE)
        self.settings = Settings(threads=threads, memory=memory)
        self.found = self._run(())
        self.first_report = f"undecided {self.undecided:.2%}, fallbacks {self.fallbacks}"

    def _run(self, thresholds: object) -> object:
        run = NativeRun([self.job], Scope.TENSOR, [], self.settings, thresholds)  # type: ignore[arg-type]
        began = time.perf_counter()
        report = run.execute()
        self.seconds = time.perf_counter() - began
        self.undecided, self.fallbacks = (report.undecided or 0) / self.job.count, report.fallbacks
        return report.thresholds

    def whole(self) -> float:
        self._run(())
        return self.seconds

    def merge_step(self) -> float:
        self._run(self.found)
        return self.seconds


class Roofline:
    """The compiled roofline program, one pass at a time."""

    def __init__(self, streams: int, size: int, threads: int, runs: int, folder: Path) -> None:
        program = folder / "roofline"
        flags = ["-O3", "-std=c++20", "-march=native", "-pthread"]
        subprocess.run(["c++", *flags, str(HERE / "roofline.cpp"), "-o", str(program)], check=True)
        command = [str(program), str(streams), str(size), str(threads), str(runs)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started = False

    def run(self) -> float:
        assert self.process.stdin
        assert self.process.stdout
        if self.started:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.started = True
        return float(self.process.stdout.readline())


def reference(tensors: list[torch.Tensor], rule: Rule) -> float:
    began = time.perf_counter()
    merge_group([""], tensors[:1], [tensors[1:]], rule, [tensors[0].dtype])
    return time.perf_counter() - began


def mergekit(python: Path, tensors: list[torch.Tensor], density: float, threads: int, folder: Path) -> float:
    path = folder / "inputs.pt"
    torch.save(tensors, path)
    command = [str(python), str(HERE / "kernel_mergekit.py"), str(path), str(density), str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=lambda text: int(float(text)), default=64 << 20, help="elements")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--slow-share", type=int, default=16, help="slow tools get one in so many elements")
    parser.add_argument("--mergekit", type=Path, help="python of an environment with mergekit 0.1.5")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "kernel.csv")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tensors = make_inputs(given.count, given.experts, getattr(torch, given.dtype))
    part = [t[: given.count // given.slow_share].clone() for t in tensors]
    rows: list[tuple[str, int, int, float]] = []

    def rule(method: str, ties: ThresholdTies) -> Rule:
        k = given.experts
        return rule_for(
            METHODS[method], weights=[1.0] * k, densities=[given.density] * k, threshold_ties=ties
        )

    first, every = (rule("ties", ties) for ties in (ThresholdTies.FIRST, ThresholdTies.ALL))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        folder = Path(scratch)
        roofline = Roofline(given.experts + 1, tensors[0].nbytes, given.threads, given.runs, folder)
        ours = Ours(tensors, first, given.threads)
        tools: dict[str, Callable[[], float]] = {
            "roofline": roofline.run,
            "pymerge ties": ours.whole,
            "pymerge ties, merge step alone": ours.merge_step,
            "pymerge ties, all ties kept": Ours(tensors, every, given.threads).whole,
            "pymerge dare_ties": Ours(tensors, rule("dare_ties", ThresholdTies.FIRST), given.threads).whole,
            "pymerge task_arithmetic": Ours(
                tensors, rule("task_arithmetic", ThresholdTies.FIRST), given.threads
            ).whole,
        }
        for run in range(given.runs):
            rows += [(name, run, given.count, tool()) for name, tool in tools.items()]
        rows += [("torch reference", run, part[0].numel(), reference(part, first)) for run in range(2)]
        if given.mergekit:
            seconds = mergekit(given.mergekit, part, given.density, given.threads, folder)
            rows.append(("mergekit 0.1.5", 0, part[0].numel(), seconds))
    report(rows, given)
    print(ours.first_report)


def report(rows: list[tuple[str, int, int, float]], given: argparse.Namespace) -> None:
    """Appends every measurement to the CSV and prints medians beside the roofline."""
    setting = {key: getattr(given, key) for key in ("experts", "dtype", "density", "threads")} | describe()
    given.csv.parent.mkdir(exist_ok=True)
    new = not given.csv.exists()
    with given.csv.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["tool", "run", "elements", "seconds", *setting])
        writer.writerows(
            [name, run, count, f"{seconds:.6f}", *setting.values()] for name, run, count, seconds in rows
        )
    speed = {
        name: statistics.median(count / seconds for other, _, count, seconds in rows if other == name)
        for name in dict.fromkeys(row[0] for row in rows)
    }
    for name, rate in speed.items():
        print(
            f"{name:32} {rate / 1e9:8.4f} G elements/s  {rate / speed['roofline']:7.1%} of the roofline"
            f"  pymerge ties is {speed['pymerge ties'] / rate:8.2f} x"
        )


if __name__ == "__main__":
    main()
