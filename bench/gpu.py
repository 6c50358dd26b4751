"""Tensors on a GPU: TIES with thresholds included, in CUDA and Triton, beside torch; and files through it.

    python -m bench.gpu                  the table, and bench/results/gpu.csv
    python -m bench.gpu --check bf16     a few merges small enough for compute-sanitizer
    python -m bench.gpu --warm 8 bf16    compiles what Triton needs for so many experts, for runs that follow
    python -m bench.gpu --rehearse       every step on the processor, with a handful of elements

The yardstick is the bandwidth that a plain copy on the card reaches in the same run; medians are compared.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import pymerge
from bench.card import Card, Rehearsal
from bench.family import make_family
from bench.machine import describe
from pymerge.errors import PymergeError

HERE = Path(__file__).parent
DENSITY = 0.2
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
SLOW_ELEMENTS = 10**8  # torch's own selection is not run on more: it needs many times the inputs' memory
SLOW_RUNS = 3
COMPILED_EXPERTS = 8  # torch.compile takes a quarter of a minute for each shape
WARM = (100_001, 2_000_001)  # elements: both ways that thresholds are found

Row = dict[str, object]


def make_inputs(count: int, experts: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A base and experts on the device; a third of each expert's entries is untouched."""
    torch.manual_seed(0)
    base = (torch.randn(count, device=device) * 0.02).to(dtype)
    tensors = [base]
    for _ in range(experts):
        update = torch.randn(count, device=device) * 5e-4
        update[torch.rand(count, device=device) < 1 / 3] = 0
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


def given_thresholds(tensors: list[Tensor]) -> list[Tensor]:
    base = tensors[0].float()
    kept = int(DENSITY * base.numel())
    return [(x.float() - base).abs().topk(kept, sorted=False).values.min() for x in tensors[1:]]


def tools(tensors: list[Tensor], card: Card, runs: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, number of runs and task of each; what a task needs is made when its turn comes."""
    base, experts = tensors[0], tensors[1:]
    out = torch.empty_like(base)
    for backend in card.backends:
        merge = partial(pymerge.merge_tensors, base, experts, density=DENSITY, out=out, backend=backend)
        yield backend, runs, merge
    if base.numel() <= SLOW_ELEMENTS:
        yield "torch eager, topk", SLOW_RUNS, partial(torch_ties, tensors)
        if len(experts) == COMPILED_EXPERTS:
            torch._dynamo.reset()
            compiled = torch.compile(torch_ties, dynamic=False)
            yield (
                "torch.compile, thresholds given",
                runs,
                partial(compiled, tensors, given_thresholds(tensors)),
            )


def measure(card: Card, given: argparse.Namespace) -> Iterator[Row]:
    """The largest and most telling first: when time is up, the rest is left out."""
    deadline = time.monotonic() + given.seconds
    wanted = [(d, n, k) for n in card.counts for k in card.experts for d in ("bf16", "f32")]
    speed = copy_speed(card, given.runs)
    yield {"tool": "copy", "gigabytes_per_second": round(speed, 1), "share_of_copy": 1.0}
    for dtype, count, experts in wanted:
        room = (experts + 2) * count * DTYPES[dtype].itemsize + 12 * count  # making them takes three f32
        if room > card.free_bytes() * 0.9 or time.monotonic() > deadline:
            print(f"left out: K = {experts}, N = {count:.0e}, {dtype}", file=sys.stderr)
            continue
        tensors: list[Tensor] = []
        try:
            tensors = make_inputs(count, experts, DTYPES[dtype], card.device)
            yield from rows_of(tensors, speed, card, given.runs)
        except torch.OutOfMemoryError as error:
            print(f"left out: K = {experts}, N = {count:.0e}, {dtype}: {first_line(error)}", file=sys.stderr)
        del tensors  # their memory counts as free when the next are made


def copy_speed(card: Card, runs: int) -> float:
    """GB/s read and written by a copy within the device."""
    size = min(card.copied, card.free_bytes() // 4)
    source, target = (torch.empty(size, dtype=torch.uint8, device=card.device) for _ in range(2))
    took = statistics.median(card.milliseconds(lambda: target.copy_(source)) for _ in range(runs + 1))
    return 2 * size / took / 1e6


def rows_of(tensors: list[Tensor], speed: float, card: Card, runs: int) -> Iterator[Row]:
    count, moved = tensors[0].numel(), sum(t.nbytes for t in tensors) + tensors[0].nbytes
    for name, times, task in tools(tensors, card, runs):
        before = card.begin_peak()
        try:
            task()
            took = statistics.median(card.milliseconds(task) for _ in range(times))
        except (PymergeError, RuntimeError) as error:
            print(f"{name}: {first_line(error)}", file=sys.stderr)
            continue
        yield {
            "tool": name,
            "dtype": str(tensors[0].dtype)[6:],
            "experts": len(tensors) - 1,
            "elements": count,
            "milliseconds": round(took, 4),
            "gigabytes_per_second": round(moved / took / 1e6, 1),
            "share_of_copy": round(moved / took / 1e6 / speed, 3),
            "extra_megabytes": (card.peak() - before) >> 20,
        }


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200]


def many_small(card: Card, runs: int) -> Iterator[Row]:
    """Tensors of a LoRA's size: in one call, and one call for each."""
    number, size = card.small_tensors
    models = [
        {f"t{i}": torch.randn(size, device=card.device, dtype=torch.bfloat16) for i in range(number)}
        for _ in range(5)
    ]
    base, experts = models[0], models[1:]
    for backend in card.backends:
        merge = partial(pymerge.merge_tensors, density=DENSITY, backend=backend)

        def loop(merge: Callable[..., object] = merge) -> None:
            for name in base:
                merge(base[name], [expert[name] for expert in experts])

        tasks: dict[str, Callable[[], object]] = {"one call": partial(merge, base, experts), "a loop": loop}
        for name, task in tasks.items():
            task()
            took = statistics.median(card.milliseconds(task) for _ in range(min(runs, SLOW_RUNS)))
            about: Row = {"dtype": "bfloat16", "experts": 4, "elements": number * size}
            yield {"tool": f"{backend}: {number:,} tensors, {name}", **about, "milliseconds": round(took, 3)}


def files(card: Card) -> Iterator[Row]:
    """One merge of checkpoints, by the CPU and by the card: seconds, and whether the files agree."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 30 * card.parameters
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as name:
        folder = Path(name)
        shape = make_family(folder, card.parameters, 4)
        experts = [{"model": f"expert{k}", "parameters": {"weight": 1.0}} for k in range(1, 5)]
        recipe = {"merge_method": "ties", "base_model": "base", "models": experts}
        (folder / "recipe.yml").write_text(json.dumps(recipe | {"parameters": {"density": DENSITY}}))
        expected = None
        for backend in ("cpu", *card.backends):
            for attempt in ("first", "second"):
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                try:
                    summary = pymerge.merge(folder / "recipe.yml", out, backend=backend)
                except PymergeError as error:
                    print(f"files, {backend}: {first_line(error)}", file=sys.stderr)
                    break
                found = digest(out)
                expected = expected or found
                moved = summary.bytes_read + summary.bytes_written
                yield {
                    "tool": f"files, {backend}, {attempt} run",
                    "dtype": "bfloat16",
                    "experts": 4,
                    "elements": shape.parameters,
                    "milliseconds": round(1e3 * summary.seconds, 1),
                    "gigabytes_per_second": round(moved / summary.seconds / 1e9, 2),
                    "same_bits": found == expected,
                }


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


def check_small(card: Card, dtypes: Sequence[str]) -> None:
    """A few merges small enough for compute-sanitizer; results are compared with the processor's."""
    for name in dtypes:
        for count in (1000, 200_003) if card.device == "cuda" else (100,):
            base, *experts = make_inputs(count, 3, DTYPES[name], card.device)
            for method in ("ties", "dare_ties", "task_arithmetic"):
                merge = partial(pymerge.merge_tensors, method=method, density=0.3)
                merged = merge(base, experts, backend=card.backends[0])
                moved = [t.cpu() for t in (base, *experts)]
                wanted = merge(moved[0], moved[1:], backend="cpu")
                same = torch.equal(merged.cpu().view(torch.uint8), wanted.view(torch.uint8))
                assert same, (name, count, method)
    print("small cases agree")


def warm(card: Card, experts: int, dtype: str) -> None:
    """Has Triton compile, so that many such processes at once spare the table from waiting for it."""
    for count in WARM:
        base, *others = make_inputs(count, experts, DTYPES[dtype], card.device)
        pymerge.merge_tensors(base, others, density=DENSITY, backend="triton")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", nargs="+", choices=list(DTYPES))
    parser.add_argument("--warm", nargs=2, metavar=("K", "TYPE"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing new after so long")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "gpu.csv")
    given = parser.parse_args()
    card = Rehearsal() if given.rehearse else Card()
    if given.check:
        check_small(card, given.check)
        return 0
    if given.warm:
        warm(card, int(given.warm[0]), given.warm[1])
        return 0
    # A time limit ends the process so; what was measured is still saved.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows: list[Row] = []
    machine = describe() | {"device": card.name()}
    try:
        for row in (
            row for part in (measure(card, given), many_small(card, given.runs), files(card)) for row in part
        ):
            rows.append(row)
            print(*row.values(), sep="\t", flush=True)
    finally:  # what was measured before time ran out stays
        save(given.csv, rows, machine)
    return 0 if all(row.get("same_bits", True) for row in rows) else 1


def save(path: Path, rows: Sequence[Row], machine: dict[str, str]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row)) + list(machine)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | machine for row in rows)


if __name__ == "__main__":
    sys.exit(main())
