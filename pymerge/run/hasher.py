"""The sha256 of a shard while it is being merged: follows the part of the file that is final."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate

from pymerge.job import TensorJob

BLOCK = 1 << 20


class ShardHasher:
    """Hashes a file from its start as far as its tensors are final; `jobs` lie in the file in their order."""

    def __init__(self, fd: int, jobs: Sequence[TensorJob]) -> None:
        self._fd = fd
        ends = (job.out.start + job.count * job.out.dtype.itemsize for job in jobs)
        self._ends = list(accumulate(ends, max))
        self._total = hashlib.sha256()
        self._offset = 0
        self._block = memoryview(bytearray(BLOCK))

    def follow(self, finished: int) -> None:
        """Goes on to the end of the first `finished` tensors."""
        if finished:
            self._go_on(self._ends[finished - 1])

    def digest(self) -> str:
        """The whole file's sha256 in hex, once every byte is written."""
        self._go_on(os.fstat(self._fd).st_size)
        return self._total.hexdigest()

    def _go_on(self, end: int) -> None:
        while self._offset < end:
            got = os.preadv(self._fd, [self._block[: end - self._offset]], self._offset)
            if got == 0:
                raise EOFError(f"the file ends at byte {self._offset}, expected {end}")
            self._total.update(self._block[:got])
            self._offset += got
