"""A small family of checkpoints of many element types, and merges of it through the ring, for its tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from device import SMALL_PARTS
from interpreter import quick_interpreter
from made import recipe_text, write_checkpoint
from ring_device import SlowDevice

from pymerge.backends import cuda
from pymerge.backends.native import Settings
from pymerge.dtypes import DType
from pymerge.errors import PymergeError
from pymerge.planner import Plan, make_plan
from pymerge.recipe import parse_recipe
from pymerge.run.local import Start, execute_plan
from pymerge.run.on_device import DeviceRun, Kernels
from pymerge.run.ring import Buffers

SHAPES = {"embed": (9000,), "norm": (70,), "scalar": (), "empty": (0, 3), "ids": (64,), "mask": (9,)} | {
    f"layer.{i}.{name}": shape for i in range(3) for name, shape in {"up": (40, 25), "norm": (17,)}.items()
}
DTYPES = {
    "norm": DType.F32,
    "ids": DType.I64,
    "mask": DType.BOOL,
    "layer.1.up": DType.F16,
    "scalar": DType.F32,
}
INTEGERS = 2
FLOATS = len(SHAPES) - INTEGERS - 1
SMALL_SHARDS = 6000
BUFFERS = Buffers(size=4096, count=2)
UNIT_BYTES = 30_000


def write_family(folder: Path) -> Path:
    """Of every element type but float64; the last expert has one more, so that some tensors mix them."""
    for seed, name in enumerate(("base", "one", "two")):
        dtypes = DTYPES | ({"layer.2.up": DType.F32} if name == "two" else {})
        write_checkpoint(folder / name, seed, shapes=SHAPES, dtypes=dtypes, shards=1 + seed)
    return folder


def planned(folder: Path, method: str = "ties", top: str = "", **parameters: object) -> Plan:
    given = {"density": 0.4} if method not in ("linear", "task_arithmetic") else {}
    base = None if method == "linear" else "base"
    text = recipe_text(method, ["one", "two"], base, weight=0.5, **(given | parameters))
    if top:
        text = text[: text.rindex("}")] + f", {top}}}"
    return make_plan(parse_recipe(text, folder), folder / "out", max_shard_bytes=SMALL_SHARDS)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def on_cpu(plan: Plan, out: Path) -> dict[str, str]:
    execute_plan(plan, out, Settings(threads=1))
    return digests(out)


def fiber_kernels(fibers: ModuleType) -> Kernels:
    merge = partial(cuda.merge_tensors, knobs=SMALL_PARTS, kernels=fibers, stream=3)
    return Kernels("cuda", merge, partial(cuda.work_bytes, knobs=SMALL_PARTS, kernels=fibers), 64)


@contextmanager
def triton_kernels() -> Iterator[Kernels]:
    from pymerge.backends import triton, triton_memory

    with quick_interpreter():
        yield Kernels("triton", triton.merge_tensors, triton_memory.work_bytes, triton.MOST_EXPERTS)


def start_with(device: SlowDevice, kernels: Kernels, **changes: Any) -> Start:
    options: dict[str, Any] = {"buffers": BUFFERS, "unit_bytes": UNIT_BYTES} | changes
    return partial(DeviceRun, device=device, kernels=kernels, **options)


def assert_refused(kind: type[PymergeError], plan: Plan, out: Path, start: Start, *parts: str) -> None:
    with pytest.raises(kind) as caught:
        execute_plan(plan, out, Settings(threads=1), start=start)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
