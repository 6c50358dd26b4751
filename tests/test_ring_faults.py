"""What goes wrong in the ring: too little memory, damaged files, interrupts; and going on afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made import write_checkpoint
from ring_device import SlowDevice
from ring_family import (
    FLOATS,
    assert_refused,
    digests,
    fiber_kernels,
    on_cpu,
    planned,
    start_with,
    write_family,
)
from torch import Tensor

from pymerge.backends import cuda
from pymerge.backends.native import NativeRun, OpenFile, Settings
from pymerge.errors import BackendError, CheckpointError, OutputError, PymergeError
from pymerge.job import TensorJob
from pymerge.rule import Rule, Scope, Trim
from pymerge.run.local import Start, execute_plan
from pymerge.run.on_device import USABLE, DeviceRun, Kernels, buffers_for


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


# -- what does not fit --------------------------------------------------------------------------------------


def memory_for(kernels: Kernels, size: int) -> int:
    """Device memory for units of so many bytes, and no larger ones."""
    rule = Rule(True, Trim.MAGNITUDE, True, True, False, (0.5, 0.5), (0.4, 0.4))
    return int((size + kernels.work_bytes([size], rule)) / USABLE)


def test_a_tensor_larger_than_the_device_goes_to_the_cpu(
    family: Path, tmp_path: Path, kernels: Kernels
) -> None:
    plan = planned(family)
    device = SlowDevice(memory_for(kernels, 50_000))
    try:
        summary = execute_plan(plan, tmp_path / "out", Settings(), start=start_with(device, kernels))
    finally:
        device.close()
    assert 0 < summary.on_cpu < FLOATS
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


def test_a_model_larger_than_the_device_goes_to_the_cpu(
    family: Path, tmp_path: Path, kernels: Kernels
) -> None:
    plan, device = planned(family, scope="model"), SlowDevice(50_000)
    try:
        summary = execute_plan(plan, tmp_path / "out", Settings(), start=start_with(device, kernels))
    finally:
        device.close()
    assert (summary.on_cpu, device.taken) == (FLOATS, [])
    assert digests(tmp_path / "out") == on_cpu(plan, tmp_path / "cpu")


def test_more_experts_than_the_kernels_take(family: Path, tmp_path: Path, device: SlowDevice) -> None:
    kernels = Kernels("cuda", cuda.merge_tensors, lambda sizes, rule: 0, 1)
    start = start_with(device, kernels)
    assert_refused(BackendError, planned(family), tmp_path / "out", start, "2 experts", "cuda", "takes 1")


@pytest.mark.parametrize("refuse_from", [0, 1, 2])
def test_a_device_without_memory_publishes_nothing_and_a_later_run_goes_on(
    refuse_from: int, family: Path, tmp_path: Path, kernels: Kernels
) -> None:
    """The memory that was free when units were cut is gone when it is asked for."""

    class Crowded(SlowDevice):
        def memory(self, size: int) -> Tensor:
            if len(self.taken) >= refuse_from:
                self.left = 0
            return super().memory(size)

        def free_bytes(self) -> int:
            return 1 << 30

    plan, device, out = planned(family), Crowded(), tmp_path / "out"
    try:
        said = "the device has too little memory for this merge: CUDA out of memory"
        assert_refused(BackendError, plan, out, start_with(device, kernels), said)
    finally:
        device.close()
    execute_plan(plan, out, Settings())
    assert digests(out) == on_cpu(plan, tmp_path / "cpu")


def test_kernels_without_memory_publish_nothing(
    family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    calls = []

    def merge(
        names: Sequence[str], inputs: Sequence[Sequence[Tensor]], outs: Sequence[Tensor], rule: Rule
    ) -> None:
        calls.append(names)
        if len(calls) == 3:
            raise BackendError("the device has too little memory for this merge")
        kernels.merge(names, inputs, outs, rule)

    failing = Kernels("cuda", merge, kernels.work_bytes, 64)
    start, plan, out = start_with(device, failing), planned(family), tmp_path / "out"
    assert_refused(BackendError, plan, out, start, "too little memory")
    assert len(calls) == 3
    again = SlowDevice()
    try:
        summary = execute_plan(plan, out, Settings(), start=start_with(again, kernels))
    finally:
        again.close()
    assert summary.shards_resumed > 0
    assert digests(out) == on_cpu(plan, tmp_path / "cpu")


def test_pinned_memory_keeps_to_the_limit(
    family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    limit = 700_000
    buffers = buffers_for(limit, threads=4)
    start = start_with(device, kernels, buffers=buffers)
    execute_plan(planned(family, scope="model"), tmp_path / "out", Settings(), start=start)
    assert 0 < device.pinned_bytes <= limit
    with pytest.raises(PymergeError, match="buffers of a device need 393,216"):
        buffers_for(200_000, threads=4)


# -- files, cancelling --------------------------------------------------------------------------------------

Change = Callable[[Sequence[OpenFile]], Sequence[OpenFile]]


def changed(change: Change, device: SlowDevice, kernels: Kernels) -> Start:
    """A start of runs that are given other files than were opened."""

    def start(
        jobs: Sequence[TensorJob], scope: Scope, files: Sequence[OpenFile], settings: Settings
    ) -> DeviceRun:
        run: DeviceRun = start_with(device, kernels)(jobs, scope, change(files), settings)  # type: ignore[assignment]
        return run

    return start


def test_an_input_truncated_while_it_is_read(tmp_path: Path, device: SlowDevice, kernels: Kernels) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes={"a": (1500,), "b": (1000,)})
    victim = tmp_path / "two" / "model.safetensors"

    def truncate(files: Sequence[OpenFile]) -> Sequence[OpenFile]:
        os.truncate(victim, victim.stat().st_size - 100)
        return files

    start, plan = changed(truncate, device, kernels), planned(tmp_path)
    parts = (str(victim), "tensor 'b'", "100 bytes short of what its header promised")
    assert_refused(CheckpointError, plan, tmp_path / "out", start, *parts)


def test_an_output_that_cannot_be_written(
    family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    opened = []

    def read_only(files: Sequence[OpenFile]) -> Sequence[OpenFile]:
        *inputs, out = files
        opened.append(os.open(f"/proc/self/fd/{out.fd}", os.O_RDONLY))
        return [*inputs, OpenFile(out.number, out.path, opened[-1])]

    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes={"a": (4000,)})
    start, plan = changed(read_only, device, kernels), planned(tmp_path)
    assert_refused(OutputError, plan, tmp_path / "out", start, "tensor 'a'", "cannot be written: Bad file")
    for fd in opened:
        os.close(fd)


def test_an_interrupt_stops_the_ring(family: Path, tmp_path: Path, kernels: Kernels) -> None:
    class Impatient:
        def begin(self, total: int) -> None:
            assert total > 0

        def update(self, done: int) -> None:
            if done:
                raise KeyboardInterrupt

    device, out = SlowDevice(delay=0.05), tmp_path / "out"
    try:
        with pytest.raises(KeyboardInterrupt):
            execute_plan(planned(family), out, Settings(), Impatient(), start_with(device, kernels))
    finally:
        device.close()
    assert not out.exists()
    execute_plan(planned(family), out, Settings())
    assert digests(out) == on_cpu(planned(family), tmp_path / "cpu")


def test_a_cancelled_run_says_so(family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels) -> None:
    def start(*arguments: Any) -> DeviceRun:
        run: DeviceRun = start_with(device, kernels)(*arguments)  # type: ignore[assignment]
        run.cancel()
        return run

    assert_refused(PymergeError, planned(family), tmp_path / "out", start, "the merge was cancelled")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_runs_of_either_kind_resume_each_other(
    scope: str, family: Path, tmp_path: Path, device: SlowDevice, kernels: Kernels
) -> None:
    plan, out, count = planned(family, scope=scope), tmp_path / "out", 0

    def start(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise BackendError("power cut")
        return start_with(device, kernels)(*arguments) if count % 2 else NativeRun(*arguments)

    if scope == "tensor":
        assert_refused(BackendError, plan, out, start, "power cut")
    summary = execute_plan(plan, out, Settings(), start=start)
    assert summary.shards_resumed == (1 if scope == "tensor" else 0)
    assert digests(out) == on_cpu(plan, tmp_path / "cpu")
