"""Merging checkpoints on a GPU: what kernels take goes through the ring, all else through the CPU core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pymerge.backends.native import NativeRun, OpenFile, Report, Settings, available_cores
from pymerge.errors import BackendError, Cancelled, PymergeError
from pymerge.job import TensorJob
from pymerge.plan_memory import pinned_bytes
from pymerge.rule import Scope
from pymerge.run.device import Device, TorchDevice
from pymerge.run.ring import Buffers, Merge, Ring, Stopped
from pymerge.run.units import UNIT_BYTES, Division, WorkBytes, divide

LEAST_BUFFER = 64 << 10
LARGEST_BUFFER = 8 << 20
MOST_READERS = 6  # copying out of the page cache keeps a core busy at a quarter of what PCIe moves
# Of the free device memory: fragmentation and the driver need the rest.
USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Kernels:
    """A backend as the ring uses it."""

    name: str
    merge: Merge
    work_bytes: WorkBytes
    most_experts: int


def kernels_of(backend: str) -> Kernels:
    """The kernels of backend "cuda" or "triton", which can run here."""
    if backend == "cuda":
        from pymerge.backends import cuda

        return Kernels("cuda", cuda.merge_tensors, cuda.work_bytes, cuda.load_kernels().most_experts)
    from pymerge.backends import triton, triton_memory

    return Kernels("triton", triton.merge_tensors, triton_memory.work_bytes, triton.MOST_EXPERTS)


def buffers_for(max_memory: int | None, threads: int) -> Buffers:
    """Pinned buffers within `max_memory` bytes (None: the default), one for each reader and two to write."""
    count = min(MOST_READERS, max(2, threads))
    room = pinned_bytes(max_memory)
    size = min(LARGEST_BUFFER, room // (count + 2)) // 4096 * 4096
    if size < LEAST_BUFFER:
        least = LEAST_BUFFER * (count + 2)
        raise PymergeError(f"{room:,} bytes of memory are too little: the buffers of a device need {least:,}")
    return Buffers(size, count)


class DeviceRun:
    """One run over a list of jobs, as NativeRun is; `execute` blocks, the others are for other threads."""

    def __init__(
        self,
        jobs: Sequence[TensorJob],
        scope: Scope,
        files: Sequence[OpenFile],
        settings: Settings,
        *,
        device: Device,
        kernels: Kernels,
        buffers: Buffers,
        unit_bytes: int = UNIT_BYTES,
    ) -> None:
        self._jobs, self._files, self._settings = jobs, files, settings
        experts = max((len(job.experts) for job in jobs), default=0)
        if experts > kernels.most_experts:
            most = kernels.most_experts
            raise BackendError(f"{experts} experts, but the {kernels.name} backend takes {most}")
        room = int(device.free_bytes() * USABLE)
        self._division: Division = divide(jobs, scope, room, kernels.work_bytes, unit_bytes)
        left = [jobs[number] for number in self._division.left]
        self._native = NativeRun(left, scope, files, settings)
        drop = settings.drop_behind
        self._ring = Ring(device, kernels.merge, jobs, files, self._division, buffers, drop_behind=drop)
        self._done: set[int] = set()
        self._finished = 0
        self._cancelled = False

    def execute(self) -> Report:
        """Merges every job. Raises CheckpointError or OutputError naming file and tensor, or Cancelled."""
        report = self._native.execute()
        self._done.update(self._division.left)
        nan = 0
        if self._division.units:
            try:
                if self._cancelled:
                    raise Stopped
                nan = self._ring.run()
            except Stopped:
                raise Cancelled("the merge was cancelled") from None
        left = [self._jobs[number] for number in self._division.left]
        merged = [self._jobs[number] for unit in self._division.units for number in unit.jobs]
        return replace(
            report,
            bytes_read=report.bytes_read + self._ring.bytes_read,
            bytes_written=report.bytes_written + sum(job.count * job.out.dtype.itemsize for job in merged),
            elements=report.elements + sum(job.count for job in merged),
            undecided=None if merged else report.undecided,
            fallbacks=None if merged else report.fallbacks,
            nan_outputs=report.nan_outputs + nan,
            cuts=(),
            on_cpu=sum(job.rule is not None and job.count > 0 for job in left),
        )

    @property
    def bytes_done(self) -> int:
        """Input bytes read so far."""
        return self._native.bytes_done + self._ring.bytes_read

    @property
    def finished(self) -> int:
        """How many of the leading jobs have their final output."""
        done, written = self._done, self._ring.written
        while self._finished < len(self._jobs) and (self._finished in done or self._finished in written):
            self._finished += 1
        return self._finished

    def cancel(self) -> None:
        """Makes `execute` raise Cancelled soon."""
        self._cancelled = True
        self._native.cancel()
        self._ring.stop()


Start: TypeAlias = Callable[[Sequence[TensorJob], Scope, Sequence[OpenFile], Settings], DeviceRun]


def start_on(backend: str, max_memory: int | None = None, threads: int | None = None) -> Start:
    """What makes the runs of backend "cuda" or "triton", which can run here."""
    kernels = kernels_of(backend)
    buffers = buffers_for(max_memory, threads or available_cores())
    device = TorchDevice()

    def start(
        jobs: Sequence[TensorJob], scope: Scope, files: Sequence[OpenFile], settings: Settings
    ) -> DeviceRun:
        return DeviceRun(jobs, scope, files, settings, device=device, kernels=kernels, buffers=buffers)

    return start
