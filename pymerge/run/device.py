"""The device as the ring sees it: memory of two kinds, and three queues that run beside each other."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Queue(Enum):
    """Work of one queue is done in order; work of different queues at the same time."""

    IN = "copies to the device"
    KERNELS = "kernels"
    OUT = "copies from the device"


class Mark(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Return once the work before the mark is done."""


class Device(Protocol):
    """What the ring needs of a GPU. Memory is given as bytes; tests have a stand-in on the processor."""

    def free_bytes(self) -> int:
        """Bytes of device memory that can still be taken."""

    def pinned(self, size: int) -> Tensor:
        """Page-locked host memory, which copies run to and from without the processor."""

    def memory(self, size: int) -> Tensor:
        """Memory on the device, aligned for any kernel."""

    def copy(self, queue: Queue, source: Tensor, to: Tensor) -> None:
        """Have the queue copy bytes between pinned memory and the device."""

    def submit(self, queue: Queue, action: Callable[[], object]) -> None:
        """Have `action` put its work into the queue."""

    def mark(self, queue: Queue) -> Mark:
        """A mark after all that the queue has been given so far."""

    def follow(self, queue: Queue, mark: Mark) -> None:
        """What the queue is given from now on starts after the mark of another queue."""

    def settle(self) -> None:
        """Return once all queues are empty."""


class TorchDevice:
    """The current device of torch.cuda, be it NVIDIA's or AMD's."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._streams = {queue: torch.cuda.Stream(self._device) for queue in Queue}

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(free + held)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, queue: Queue, source: Tensor, to: Tensor) -> None:
        self.submit(queue, lambda: to.copy_(source, non_blocking=True))

    def submit(self, queue: Queue, action: Callable[[], object]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._streams[queue]):
            action()

    def mark(self, queue: Queue) -> Mark:
        # blocking: a thread that waits for its copy must not keep a core busy.
        event: Mark = torch.cuda.Event(blocking=True)
        self._streams[queue].record_event(event)
        return event

    def follow(self, queue: Queue, mark: Mark) -> None:
        self._streams[queue].wait_event(mark)

    def settle(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
