"""A device on the processor for tests of the ring: three queues that really run beside each other, late.

Every queue is a thread that takes its time, so what forgets to wait for a mark reads bytes that are not there
yet. Memory starts as garbage. An action's error comes out of what is called next, as a GPU's do.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from pymerge.run.device import Mark, Queue

GARBAGE = 0xA5
MOST_DELAY = 0.003


class _Mark:
    def __init__(self, device: SlowDevice) -> None:
        self.reached = threading.Event()
        self._device = device

    def synchronize(self) -> None:
        self.reached.wait()
        self._device.raise_error()


class SlowDevice:
    """`memory_bytes`: what can be taken in all. `close` ends its threads."""

    def __init__(self, memory_bytes: int = 1 << 30, delay: float = MOST_DELAY, seed: int = 0) -> None:
        self.left, self._delay, self._random = memory_bytes, delay, random.Random(seed)
        self.pinned_bytes = 0
        self.taken: list[int] = []
        self._error: BaseException | None = None
        self._work: dict[Queue, SimpleQueue[Callable[[], object] | None]] = {q: SimpleQueue() for q in Queue}
        self._threads = [threading.Thread(target=self._run, args=(queue,)) for queue in Queue]
        for thread in self._threads:
            thread.start()

    def free_bytes(self) -> int:
        return self.left

    def pinned(self, size: int) -> Tensor:
        self.pinned_bytes += size
        return torch.full((size,), GARBAGE, dtype=torch.uint8)

    def memory(self, size: int) -> Tensor:
        if size > self.left:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nmore")
        self.taken.append(size)
        room = torch.full((size + 256,), GARBAGE, dtype=torch.uint8)
        start = -room.data_ptr() % 256
        return room[start : start + size]

    def copy(self, queue: Queue, source: Tensor, to: Tensor) -> None:
        assert queue is not Queue.KERNELS
        self.submit(queue, lambda: to.copy_(source))

    def submit(self, queue: Queue, action: Callable[[], object]) -> None:
        self.raise_error()
        self._work[queue].put(action)

    def mark(self, queue: Queue) -> Mark:
        mark = _Mark(self)
        self._work[queue].put(mark.reached.set)
        return mark

    def follow(self, queue: Queue, mark: Mark) -> None:
        assert isinstance(mark, _Mark)
        self._work[queue].put(mark.reached.wait)

    def settle(self) -> None:
        for mark in [self.mark(queue) for queue in Queue]:
            mark.synchronize()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        for work in self._work.values():
            work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, queue: Queue) -> None:
        while (action := self._work[queue].get()) is not None:
            time.sleep(self._random.uniform(0, self._delay))
            try:
                with torch.inference_mode(), np.errstate(all="ignore"):
                    action()
            except BaseException as error:
                self._error = self._error or error
