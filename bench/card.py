"""The GPU that bench.gpu measures, and a stand-in with which all but the times can be tried without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A device: its clock and its memory. `counts`, `experts`: what is measured on it."""

    device: str = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    counts: tuple[int, ...] = (10**9, 10**8, 10**7, 10**6, 10**5)
    experts: tuple[int, ...] = (8, 4, 16, 2, 32)
    small_tensors: tuple[int, int] = (2000, 16 * 4096)  # how many, and of how many elements
    copied: int = 4 << 30
    parameters: int = 400_000_000

    def milliseconds(self, task: Callable[[], object]) -> float:
        """What the device takes for a task."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        task()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def free_bytes(self) -> int:
        """Memory that can be taken; gives back to the driver what torch keeps."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def begin_peak(self) -> int:
        """From here on the peak is counted; bytes in use now."""
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak(self) -> int:
        """The most bytes in use since."""
        return int(torch.cuda.max_memory_allocated())

    def name(self) -> str:
        return str(torch.cuda.get_device_name())


@dataclass(frozen=True)
class Rehearsal(Card):
    """The processor as a card: the same steps on a few elements, in Triton's interpreter."""

    device: str = "cpu"
    backends: tuple[str, ...] = ("cpu", "triton")
    counts: tuple[int, ...] = (3000, 100)
    experts: tuple[int, ...] = (2, 1)
    small_tensors: tuple[int, int] = (3, 50)
    copied: int = 1 << 10
    parameters: int = 1000

    def milliseconds(self, task: Callable[[], object]) -> float:
        begin = time.perf_counter()
        task()
        return 1e3 * (time.perf_counter() - begin)

    def free_bytes(self) -> int:
        return 1 << 30

    def begin_peak(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def name(self) -> str:
        return "rehearsal"
