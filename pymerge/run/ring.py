"""The ring: units of tensors go from files through a few slots of a device and back, in overlapping steps.

    read into pinned memory -> copy in -> merge -> copy out -> write at the output's offset

A slot holds one unit's inputs and results on the device. One thread fills slots (with several readers), one
merges, one empties them; the copies and the kernels run on three queues of the device. Tensors larger
than the pinned buffers pass through them in chunks, so that host memory does not depend on the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from pymerge.backends.native import OpenFile
from pymerge.dtypes import DType
from pymerge.errors import BackendError, CheckpointError, OutputError
from pymerge.job import TensorJob
from pymerge.rule import Rule
from pymerge.run.device import Device, Mark, Queue
from pymerge.run.units import Division, Span, Unit, chunks

T = TypeVar("T")
# Names, inputs (the base first where the rule has one), results, rule: queues the work on the current stream.
Merge: TypeAlias = Callable[[Sequence[str], Sequence[Sequence[Tensor]], Sequence[Tensor], Rule], object]

POLL_SECONDS = 0.05  # how soon a waiting thread hears that the run has stopped


@dataclass(frozen=True, slots=True)
class Buffers:
    """Pinned memory: `count` buffers of `size` bytes for reading, two more for writing."""

    size: int
    count: int


@dataclass
class _Pinned:
    """A pinned buffer and the mark after which it is free again."""

    memory: Tensor
    view: memoryview
    free_at: Mark | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A unit in its slot; `mark`: where it is complete."""

    unit: Unit
    slot: Tensor
    mark: Mark


class Stopped(Exception):
    """Another thread has failed, or the run was cancelled."""


class Ring:
    """One passage of a division's units; `run` blocks, the others may be called from other threads."""

    def __init__(
        self,
        device: Device,
        merge: Merge,
        jobs: Sequence[TensorJob],
        files: Sequence[OpenFile],
        division: Division,
        buffers: Buffers,
        *,
        drop_behind: bool = False,
    ) -> None:
        self._device, self._merge, self._jobs = device, merge, jobs
        self._files: Mapping[int, OpenFile] = {file.number: file for file in files}
        self._division, self._buffers, self._drop_behind = division, buffers, drop_behind
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        self._loaded: SimpleQueue[_Loaded] = SimpleQueue()
        self._merged: SimpleQueue[_Loaded] = SimpleQueue()
        self._unused: SimpleQueue[_Pinned] = SimpleQueue()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.written: set[int] = set()  # the jobs whose results are in their files

    def stop(self) -> None:
        """Makes `run` raise Stopped soon."""
        self._stopping.set()

    def run(self) -> int:
        """Merges every unit; returns how many results are NaN. Errors name file and tensor."""
        try:
            nan = self._guard(self._take_memory)
        except Stopped:
            nan = None
        if nan is not None:
            steps = [threading.Thread(target=self._try, args=(step,)) for step in (self._load, self._save)]
            for step in steps:
                step.start()
            self._try(lambda: self._compute(nan))
            for step in steps:
                step.join()
        self._try(self._device.settle)
        if self._error is not None:
            raise self._error
        if self._stopping.is_set() or nan is None:
            raise Stopped
        return int(nan.item())

    # -- the three steps ------------------------------------------------------------------------------------

    def _take_memory(self) -> Tensor:
        """All that is needed but for the kernels' own; returns the counter of NaN."""
        largest = max(unit.size for unit in self._division.units)
        for _ in range(self._division.slots):
            self._free.put(self._device.memory(largest))
        for _ in range(self._buffers.count):
            self._unused.put(self._pinned())
        self._writing = [self._pinned(), self._pinned()]
        nan = self._device.memory(torch.int64.itemsize).view(torch.int64)
        self._device.submit(Queue.KERNELS, nan.zero_)
        return nan

    def _load(self) -> None:
        with ThreadPoolExecutor(self._buffers.count, thread_name_prefix="read") as readers:
            for unit in self._division.units:
                slot = self._take(self._free)
                parts = chunks(unit.inputs, self._buffers.size)
                fills = [readers.submit(self._try, partial(self._fill, slot, part)) for part in parts]
                for fill in fills:
                    fill.result()
                self._check()
                self._loaded.put(_Loaded(unit, slot, self._device.mark(Queue.IN)))
                for span in unit.inputs if self._drop_behind else ():
                    os.posix_fadvise(self._files[span.file].fd, span.start, span.size, os.POSIX_FADV_DONTNEED)

    def _compute(self, nan: Tensor) -> None:
        for _ in self._division.units:
            loaded = self._take(self._loaded)
            self._device.follow(Queue.KERNELS, loaded.mark)
            self._device.submit(Queue.KERNELS, partial(self._merge_unit, loaded, nan))
            mark = self._device.mark(Queue.KERNELS)
            self._merged.put(_Loaded(loaded.unit, loaded.slot, mark))

    def _save(self) -> None:
        for _ in self._division.units:
            merged = self._take(self._merged)
            self._device.follow(Queue.OUT, merged.mark)
            on_its_way: tuple[_Pinned, Sequence[Span]] | None = None
            for part in chunks(merged.unit.outs, self._buffers.size):
                self._check()
                self._writing.reverse()  # one is copied to while the other is written
                buffer = self._writing[0]
                begin, size = part[0].at, part[-1].at + part[-1].size - part[0].at

                self._device.copy(Queue.OUT, merged.slot[begin : begin + size], buffer.memory[:size])
                buffer.free_at = self._device.mark(Queue.OUT)
                if on_its_way is not None:
                    self._write(*on_its_way)
                on_its_way = buffer, part
            if on_its_way is not None:
                self._write(*on_its_way)
            self._free.put(merged.slot)
            self.written.update(merged.unit.jobs)

    # -- one chunk, one unit --------------------------------------------------------------------------------

    def _fill(self, slot: Tensor, part: Sequence[Span]) -> None:
        buffer = self._take(self._unused)
        if buffer.free_at is not None:
            buffer.free_at.synchronize()
        begin, size = part[0].at, part[-1].at + part[-1].size - part[0].at
        for span in part:
            self._check()
            self._read(span, buffer.view[span.at - begin : span.at - begin + span.size])

        with self._lock:  # the mark must follow this copy
            self._device.copy(Queue.IN, buffer.memory[:size], slot[begin : begin + size])
            buffer.free_at = self._device.mark(Queue.IN)
            self.bytes_read += sum(span.size for span in part)
        self._unused.put(buffer)

    def _merge_unit(self, loaded: _Loaded, nan: Tensor) -> None:
        unit, slot = loaded.unit, loaded.slot
        jobs = [self._jobs[number] for number in unit.jobs]
        rows: dict[int, list[Tensor]] = {number: [] for number in unit.jobs}
        for span in unit.inputs:
            job = self._jobs[span.job]
            x = _typed(slot, span, job.inputs[len(rows[span.job])].dtype)
            rows[span.job].append(x if job.cast is None else x.to(_torch_type(job.cast)))
        outs = [_typed(slot, span, job.out.dtype) for span, job in zip(unit.outs, jobs, strict=True)]
        rule = jobs[0].rule
        assert rule is not None
        self._merge([job.name for job in jobs], list(rows.values()), outs, rule)
        for out in outs:
            nan += torch.isnan(out).sum()

    def _write(self, buffer: _Pinned, part: Sequence[Span]) -> None:
        assert buffer.free_at is not None
        buffer.free_at.synchronize()
        for span in part:
            at = span.at - part[0].at
            self._write_span(span, buffer.view[at : at + span.size])

    # -- files ----------------------------------------------------------------------------------------------

    def _read(self, span: Span, to: memoryview) -> None:
        file, done = self._files[span.file], 0
        while done < span.size:
            try:
                got = os.preadv(file.fd, [to[done:]], span.start + done)
            except OSError as error:
                raise CheckpointError(self._said(span, f"cannot be read: {error.strerror}")) from error
            if got == 0:
                left = span.size - done
                what = f"ends at byte {span.start + done}, {left} bytes short of what its header promised"
                raise CheckpointError(self._said(span, what))
            done += got

    def _write_span(self, span: Span, data: memoryview) -> None:
        file, done = self._files[span.file], 0
        while done < span.size:
            try:
                done += os.pwrite(file.fd, data[done:], span.start + done)
            except OSError as error:
                raise OutputError(self._said(span, f"cannot be written: {error.strerror}")) from error

    def _said(self, span: Span, what: str) -> str:
        return f"{self._files[span.file].path}: tensor {self._jobs[span.job].name!r}: {what}"

    # -- threads --------------------------------------------------------------------------------------------

    def _pinned(self) -> _Pinned:
        memory = self._device.pinned(self._buffers.size)
        return _Pinned(memory, memoryview(memory.numpy()))

    def _take(self, queue: SimpleQueue[T]) -> T:
        while True:
            self._check()
            with suppress(Empty):
                return queue.get(timeout=POLL_SECONDS)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _try(self, step: Callable[[], Any]) -> None:
        with suppress(Stopped):
            self._guard(step)

    def _guard(self, step: Callable[[], T]) -> T:
        """What `step` returns; its error, the first of all, becomes the run's and stops every thread."""
        try:
            return step()
        except Stopped:
            raise
        except BaseException as error:
            with self._lock:
                self._error = self._error or _in_words(error)
            self._stopping.set()
            raise Stopped from error


def _typed(slot: Tensor, span: Span, dtype: DType) -> Tensor:
    return slot[span.at : span.at + span.size].view(_torch_type(dtype))


def _torch_type(dtype: DType) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found


def _in_words(error: BaseException) -> BaseException:
    """What torch says of a device, as one sentence."""
    said = str(error).split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        return BackendError(f"the device has too little memory for this merge: {said}")
    if isinstance(error, RuntimeError):
        return BackendError(f"the device failed: {said}")
    return error
