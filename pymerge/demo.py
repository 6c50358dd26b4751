"""pymerge demo: makes a small family of checkpoints, merges it by every method, checks and times that."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pymerge.api import merge, plan
from pymerge.checkpoint.index import Checkpoint, open_checkpoint
from pymerge.demo_check import Expectation, expected
from pymerge.demo_family import EXPERTS, Bits, make_family
from pymerge.errors import OutputError
from pymerge.methods import METHODS

WEIGHTS = tuple((3 + k) / 10 for k in range(EXPERTS))
EXPECTATIONS = (
    Expectation("linear", WEIGHTS),
    Expectation("task_arithmetic", WEIGHTS, lambda_=0.5),
    Expectation("ties", WEIGHTS, density=0.2),
    Expectation("dare_linear", WEIGHTS, density=0.3, lambda_=0.25, seed=7),
    Expectation("dare_ties", WEIGHTS, density=0.3, lambda_=0.25, seed=7),
    Expectation("breadcrumbs", WEIGHTS, density=0.3, lambda_=0.5),
    Expectation("breadcrumbs_ties", WEIGHTS, density=0.3),
    Expectation("della", WEIGHTS, density=0.3, lambda_=0.5, seed=7),
    Expectation("della_linear", WEIGHTS, density=0.3, lambda_=0.25, seed=7),
    Expectation("sce", WEIGHTS, t=0.3),
    Expectation("ram", WEIGHTS),
    Expectation("ramplus_tl", WEIGHTS),
    Expectation("nearswap", WEIGHTS[:1], t=0.001),
    Expectation("arcee_fusion", WEIGHTS[:1]),
    Expectation("magmax", WEIGHTS, lambda_=0.5),
    Expectation("emr", WEIGHTS, lambda_=0.5),
    Expectation("consensus", WEIGHTS, lambda_=0.5),
    Expectation("slerp", WEIGHTS[:1], t=0.4),
    Expectation("nuslerp", WEIGHTS[:2]),
    Expectation("multislerp", WEIGHTS),
    Expectation("karcher", WEIGHTS),
    Expectation("model_stock", WEIGHTS),
    Expectation("passthrough", WEIGHTS[:1]),
)
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: seconds; bytes moved; seconds of only reading and writing those bytes."""

    method: str
    seconds: float
    moved: int
    floor: float
    equal: bool


def run_demo(folder: Path | None, say: Callable[[str], None]) -> bool:
    """The whole demo in `folder` (None: a temporary one, removed at the end); whether all was right."""
    with _place(folder) as home:
        began = time.perf_counter()
        base, experts = make_family(home)
        say(f"made a base and {EXPERTS} experts in {home} ({time.perf_counter() - began:.1f} s)")
        # The first plan imports what the merges then find loaded.
        for what in EXPECTATIONS:
            plan(_write_recipe(what, home, base, experts))
        rows = [_row(what, home, base, experts) for what in EXPECTATIONS]
        for line in table(rows):
            say(line)
        if folder is not None:
            say(f"the inputs, recipes and results stay in {home}")
    right = all(row.equal for row in rows)
    say("every element of every result is right" if right else "some results are WRONG")
    return right


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="pymerge-demo-") as name:
            yield Path(name)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not an empty folder; give another, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _row(what: Expectation, home: Path, base: Path, experts: list[Path]) -> Row:
    recipe = _recipe_path(what, home)
    out = home / f"merged-{what.method}"
    summary = merge(recipe, out)
    experts = experts[: len(what.weights)]
    inputs = [open_checkpoint(path) for path in ([base, *experts] if what.has_base else experts)]
    floor = _floor(inputs, home / "floor.bin", summary.bytes_written)
    moved = summary.bytes_read + summary.bytes_written
    return Row(what.method, summary.seconds, moved, floor, _is_right(what, out, base, experts))


def _recipe_path(what: Expectation, home: Path) -> Path:
    return home / f"{what.method}.yml"


def _write_recipe(what: Expectation, home: Path, base: Path, experts: list[Path]) -> Path:
    lines = [f"merge_method: {what.method}", f"seed: {what.seed}", "models:"]
    for path, weight in zip(experts, what.weights, strict=False):
        lines.append(f"  - model: {path.name}")
        if METHODS[what.method].weighted:
            lines += ["    parameters:", f"      weight: {weight!r}"]
    if what.has_base:
        lines.append(f"base_model: {base.name}")
    share = "select_topk" if what.method == "sce" else "t"
    given = {"lambda": what.lambda_, "density": what.density, share: what.t}
    parameters = {name: value for name, value in given.items() if value != 1}
    if parameters:
        lines += ["parameters:", *(f"  {name}: {value}" for name, value in parameters.items())]
    path = _recipe_path(what, home)
    path.write_text("\n".join(lines) + "\n")
    return path


def _floor(inputs: list[Checkpoint], target: Path, size: int) -> float:
    """Seconds to read every input byte once and write and flush as many bytes as the output has."""
    block = memoryview(mmap.mmap(-1, BLOCK))
    began = time.perf_counter()
    for checkpoint in inputs:
        for shard in checkpoint.shards:
            fd = os.open(shard.path, os.O_RDONLY)
            offset = 0
            while got := os.preadv(fd, [block], offset):
                offset += got
            os.close(fd)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for offset in range(0, size, BLOCK):
        os.pwrite(fd, block[: min(BLOCK, size - offset)], offset)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def _is_right(what: Expectation, out: Path, base: Path, experts: list[Path]) -> bool:
    merged, origin = open_checkpoint(out), open_checkpoint(base)
    tuned = [open_checkpoint(path) for path in experts[: len(what.weights)]]
    if merged.tensors.keys() != origin.tensors.keys():
        return False

    def is_right(name: str) -> bool:
        inputs = [_bits(expert, name) for expert in tuned]
        row = origin.tensors[name].entry.shape[-1]
        wanted = expected(what, name, _bits(origin, name), inputs, row)
        return np.array_equal(_bits(merged, name), wanted)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return all(pool.map(is_right, merged.tensors))


def _bits(checkpoint: Checkpoint, name: str) -> Bits:
    """One whole bf16 tensor, flat."""
    ref = checkpoint.tensors[name]
    return np.fromfile(
        checkpoint.shards[ref.shard].path, dtype=np.uint16, count=ref.entry.count, offset=ref.entry.begin
    )


def table(rows: list[Row]) -> list[str]:
    """The results as lines of text."""
    lines = [f"{'method':<16} {'seconds':>8} {'GB/s':>7} {'floor s':>8} {'times floor':>12}  equal"]
    for row in rows:
        speed = row.moved / row.seconds / 1e9
        lines.append(
            f"{row.method:<16} {row.seconds:>8.3f} {speed:>7.2f} {row.floor:>8.3f}"
            f" {row.seconds / row.floor:>12.1f}  {'yes' if row.equal else 'NO'}"
        )
    return [
        *lines,
        "floor: only reading those inputs once and writing, with flush, that many bytes, one thread",
    ]
