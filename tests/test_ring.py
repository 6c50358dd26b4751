"""Checkpoints through the ring: the CPU's files from both kinds of kernels, on a stand-in for a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made import recipe_text, write_checkpoint
from ring_device import SlowDevice
from ring_family import (
    digests,
    fiber_kernels,
    on_cpu,
    planned,
    start_with,
    triton_kernels,
    write_family,
)

import pymerge
from pymerge.backends.native import Settings
from pymerge.checkpoint.staging import Staging
from pymerge.dtypes import DType
from pymerge.errors import BackendError
from pymerge.job import Region
from pymerge.run.device import Mark, Queue
from pymerge.run.local import execute_plan
from pymerge.run.on_device import Kernels
from pymerge.run.ring import Buffers
from pymerge.run.settings import missing_for, start_for


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def device() -> Iterator[SlowDevice]:
    made = SlowDevice()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


@pytest.fixture
def kernels(fibers: ModuleType) -> Kernels:
    return fiber_kernels(fibers)


# -- the same files -----------------------------------------------------------------------------------------

MERGES: list[dict[str, Any]] = [
    {"method": "ties"},
    {"method": "ties", "threshold_ties": "all", "lambda_": 0.7},
    {"method": "ties", "scope": "model"},
    {"method": "ties", "scope": "model", "threshold_ties": "all", "top": '"dtype": "float32"'},
    {"method": "ties", "top": '"dtype": "bfloat16"', "rescale": True},
    {"method": "linear", "top": '"out_dtype": "float32"'},
    {"method": "task_arithmetic"},
    {"method": "dare_linear"},
    {"method": "breadcrumbs", "gamma": 0.1},
    {"method": "breadcrumbs_ties", "gamma": 0.1, "scope": "model", "rescale": True},
    {"method": "dare_ties", "top": '"dtype": "float16", "seed": 5'},
]


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_cuda_kernels_write_the_files_of_the_cpu(
    merge: dict[str, Any], family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    plan = planned(family, **merge)
    assert len(plan.layouts) > 2
    start = start_with(device, kernels)
    summary = execute_plan(plan, tmp_path / "out", Settings(threads=1), start=start)
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")
    assert summary.bytes_read >= plan.bytes_read // plan.passes
    assert summary.bytes_written == sum(job.count * job.out.dtype.itemsize for s in plan.jobs for job in s)
    assert summary.on_cpu == 0
    assert (summary.undecided, summary.fallbacks, summary.undecided_share) == (None, None, None)
    assert len(device.taken) > 1


@pytest.mark.parametrize(
    "merge", [MERGES[i] for i in (0, 3, 5, 6, 8)], ids=str
)  # no rescale: it is slow there
def test_triton_kernels_write_the_files_of_the_cpu(
    merge: dict[str, Any], family: Path, tmp_path: Path, device: SlowDevice
) -> None:
    pytest.importorskip("triton")
    plan = planned(family, **merge)
    with triton_kernels() as kernels:
        execute_plan(plan, tmp_path / "out", Settings(threads=1), start=start_with(device, kernels))
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


@pytest.mark.parametrize("buffer", [64, 1000, 1 << 20])
@pytest.mark.parametrize("unit", [1, 5000, 1 << 20])
def test_any_buffer_and_unit_gives_the_same_files(
    buffer: int, unit: int, family: Path, tmp_path: Path, kernels: Kernels
) -> None:
    plan = planned(family)
    device = SlowDevice(delay=1e-4, seed=buffer + unit)
    try:
        start = start_with(device, kernels, buffers=Buffers(buffer, 3), unit_bytes=unit)
        execute_plan(plan, tmp_path / "out", Settings(threads=1, drop_behind=True), start=start)
    finally:
        device.close()
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


def test_nan_are_counted_and_float64_goes_to_the_cpu(
    tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    shapes = {"wide": (300,), "narrow": (300,), "ids": (7,)}
    dtypes = {"wide": DType.F64, "ids": DType.I32}
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes=shapes, dtypes=dtypes)
    broken = tmp_path / "one" / "model.safetensors"
    plan = planned(tmp_path, "task_arithmetic")
    region = next(job for job in plan.jobs[0] if job.name == "narrow").experts[0]
    assert isinstance(region, Region)
    with broken.open("r+b") as file:
        file.seek(region.start)
        file.write(b"\xc0\x7f" * 5)
    plan = planned(tmp_path, "task_arithmetic")
    summary = execute_plan(plan, tmp_path / "out", Settings(), start=start_with(device, kernels))
    assert (summary.nan_outputs, summary.on_cpu) == (5, 1)
    assert "merged on the CPU: 1 of these tensors" in summary.describe()
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


def test_what_a_device_does_not_count_stays_unknown_after_a_resume(
    family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    plan, out = planned(family), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "publish", unpublished)
        with pytest.raises(OSError, match="no manifest"):
            execute_plan(plan, out, Settings(threads=1), start=start_with(device, kernels))
    summary = execute_plan(plan, out, Settings(threads=1))
    assert summary.shards_resumed == len(plan.layouts)
    assert (summary.undecided, summary.fallbacks) == (None, None)


def unpublished(self: Staging, files: object, manifest: object) -> None:
    raise OSError("no manifest")


def test_the_ring_waits_for_the_device(family: Path, tmp_path: Path, kernels: Kernels) -> None:
    """Without the waits between queues the stand-in gives wrong bytes, so it would show one forgotten."""

    class Careless(SlowDevice):
        def follow(self, queue: Queue, mark: Mark) -> None:
            pass

    plan, device = planned(family, "linear"), Careless(delay=0.01)
    try:
        execute_plan(plan, tmp_path / "out", Settings(), start=start_with(device, kernels))
    finally:
        device.close()
    assert digests(tmp_path / "out") != on_cpu(plan, tmp_path / "cpu")


# -- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_files_from_the_gpu(merge: dict[str, Any], backend: str, family: Path, tmp_path: Path) -> None:
    missing = missing_for(backend)
    if missing is not None:
        pytest.skip(missing)
    plan = planned(family, **merge)
    start = start_for(backend, max_memory=8 << 20)
    execute_plan(plan, tmp_path / "out", Settings(threads=1), start=start)
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_is_refused_before_anything_is_read(backend: str, family: Path) -> None:
    if missing_for(backend) is None:
        pytest.skip("it can run here")
    with pytest.raises(BackendError, match=f"the {backend} backend (was not built|needs)") as caught:
        pymerge.merge(recipe_text("linear", [family / "one"], None), family / "never", backend=backend)
    assert "\n" not in str(caught.value)
    assert not list(family.glob("never*"))


def test_an_unknown_backend_is_refused(family: Path) -> None:
    with pytest.raises(BackendError, match="backend 'tpu' does not merge checkpoints; cpu, cuda, triton do"):
        pymerge.merge(recipe_text("linear", [family / "one"], None), family / "never", backend="tpu")
