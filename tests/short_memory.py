"""A device whose memory is short, for tests: counts what torch allocates, and refuses what is too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShortMemory(TorchDispatchMode):  # type: ignore[misc]
    """While it is entered, storages other than those of `given` may have `limit` bytes together."""

    def __init__(self, given: Sequence[Tensor], limit: int | None = None) -> None:
        super().__init__()
        self.limit, self.peak = limit, 0
        self._given = {x.untyped_storage().data_ptr() for x in given}
        self._held: dict[int, tuple[int, list[ref[Tensor]]]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._given:
                self._note(x)
        return result

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        holders = self._held.setdefault(storage.data_ptr(), (storage.nbytes(), []))[1]
        holders.append(ref(x))
        alive = {at: (size, [r for r in refs if r() is not None]) for at, (size, refs) in self._held.items()}
        self._held = {at: entry for at, entry in alive.items() if entry[1]}
        self.peak = max(self.peak, self.live)
        if self.limit is not None and self.live > self.limit:
            raise torch.OutOfMemoryError(f"out of memory: {storage.nbytes()} bytes\nmore")

    @property
    def live(self) -> int:
        return sum(size for size, _ in self._held.values())
