"""Tensors on a GPU: TIES with thresholds included, in CUDA and Triton, beside torch.

The yardstick is the bandwidth that a plain copy on the card reaches in the same run; medians are compared.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import pymerge
from bench.machine import describe

HERE = Path(__file__).parent
DENSITY = 0.2
SLOW_ELEMENTS = 10**8  # torch's own selection is not run on more: it needs many times the inputs' memory


def make_inputs(count: int, experts: int, dtype: torch.dtype) -> list[Tensor]:
    """A base and experts on the device; a third of each expert's entries is untouched."""
    torch.manual_seed(0)
    base = (torch.randn(count, device="cuda") * 0.02).to(dtype)
    tensors = [base]
    for _ in range(experts):
        update = torch.randn(count, device="cuda") * 5e-4
        update[torch.rand(count, device="cuda") < 1 / 3] = 0
        tensors.append((base.float() + update).to(dtype))
    return tensors


def torch_ties(tensors: list[Tensor], thresholds: list[Tensor] | None = None) -> Tensor:
    """TIES as torch users write it; thresholds from topk unless given."""
    base = tensors[0].float()
    kept = []
    for k, x in enumerate(tensors[1:]):
        d = x.float() - base
        if thresholds is None:
            threshold = d.abs().topk(int(DENSITY * d.numel()), sorted=False).values.min()
        else:
            threshold = thresholds[k]
        kept.append(torch.where(d.abs() >= threshold, d, 0.0))
    stack = torch.stack(kept)
    side = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (stack * side) > 0
    mean = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (base + mean).to(tensors[0].dtype)


def milliseconds(task: Callable[[], object], runs: int) -> Iterator[float]:
    task()
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        task()
        end.record()
        torch.cuda.synchronize()
        yield begin.elapsed_time(end)


def tools(tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    base, experts = tensors[0], tensors[1:]
    out = torch.empty_like(base)

    def ours(backend: str) -> Callable[[], object]:
        return lambda: pymerge.merge_tensors(base, experts, density=DENSITY, out=out, backend=backend)

    found: dict[str, Callable[[], object]] = {"cuda": ours("cuda"), "triton": ours("triton")}
    if base.numel() <= SLOW_ELEMENTS:
        deltas = [(x.float() - base.float()).abs() for x in experts]
        given = [d.topk(int(DENSITY * d.numel()), sorted=False).values.min() for d in deltas]
        compiled = torch.compile(torch_ties)
        found["torch eager, topk"] = lambda: torch_ties(tensors)
        found["torch.compile, thresholds given"] = lambda: compiled(tensors, given)
    return found


def measure(given: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    deadline = time.monotonic() + given.seconds
    for dtype in (torch.bfloat16, torch.float32):
        for count in (10**5, 10**6, 10**7, 10**8, 10**9):
            for experts in (2, 4, 8, 16, 32):
                room = (experts + 2) * count * dtype.itemsize
                if room > torch.cuda.mem_get_info()[0] * 0.8 or time.monotonic() > deadline:
                    print(f"left out: K = {experts}, N = {count:.0e}, {dtype}", file=sys.stderr)
                    continue
                tensors = make_inputs(count, experts, dtype)
                rows += rows_of(tensors, given.runs)
                del tensors
                torch.cuda.empty_cache()
    return rows


def copy_of(size: int) -> Callable[[], object]:
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def rows_of(tensors: list[Tensor], runs: int) -> list[dict[str, object]]:
    count, moved = tensors[0].numel(), sum(t.nbytes for t in tensors) + tensors[0].nbytes
    copy = statistics.median(milliseconds(copy_of(moved // 2), runs))
    rows = []
    for name, task in tools(tensors).items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            took = statistics.median(milliseconds(task, runs))
        except (pymerge.errors.PymergeError, RuntimeError) as error:
            print(f"{name}: {str(error)[:200]}", file=sys.stderr)
            continue
        rows.append(
            {
                "tool": name,
                "dtype": str(tensors[0].dtype)[6:],
                "experts": len(tensors) - 1,
                "elements": count,
                "milliseconds": round(took, 4),
                "gigabytes_per_second": round(moved / took / 1e6, 1),
                "share_of_copy": round(copy / took, 3),
                "extra_megabytes": (torch.cuda.max_memory_allocated() - before) >> 20,
            }
        )
        print(*rows[-1].values(), sep="\t", flush=True)
    return rows


def many_small(runs: int) -> list[dict[str, object]]:
    """2,000 tensors of a LoRA's size: in one call, and one call for each."""
    sizes = {f"t{i}": 16 * 4096 for i in range(2000)}
    models = [
        {name: torch.randn(size, device="cuda", dtype=torch.bfloat16) for name, size in sizes.items()}
        for _ in range(5)
    ]
    base, experts = models[0], models[1:]

    def one_call() -> object:
        return pymerge.merge_tensors(base, experts, density=DENSITY, backend="cuda")

    def loop() -> object:
        return [
            pymerge.merge_tensors(base[name], [e[name] for e in experts], density=DENSITY, backend="cuda")
            for name in sizes
        ]

    return [
        {"tool": name, "experts": 4, "milliseconds": round(statistics.median(milliseconds(task, runs)), 3)}
        for name, task in {"2,000 tensors, one call": one_call, "2,000 tensors, a loop": loop}.items()
    ]


def check_small() -> None:
    """A few merges small enough for compute-sanitizer; results are compared with the reference."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for count in (1000, 200_003):
            base, *experts = make_inputs(count, 3, dtype)
            for method in ("ties", "dare_ties", "task_arithmetic"):
                merged = pymerge.merge_tensors(base, experts, method=method, density=0.3, backend="cuda")
                moved = [t.cpu() for t in (base, *experts)]
                wanted = pymerge.merge_tensors(moved[0], moved[1:], method=method, density=0.3)
                assert torch.equal(merged.cpu().view(torch.uint8), wanted.view(torch.uint8)), (
                    dtype,
                    count,
                    method,
                )
    print("small cases agree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="only small cases, compared with the processor")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing new after so long")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "gpu.csv")
    given = parser.parse_args()
    if given.small:
        return check_small()
    rows = measure(given) + many_small(given.runs)
    machine = describe() | {"device": torch.cuda.get_device_name()}
    columns = list(dict.fromkeys(key for row in rows for key in row)) + list(machine)
    with given.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    return None


if __name__ == "__main__":
    main()
