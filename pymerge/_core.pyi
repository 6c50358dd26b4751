"""The compiled core (csrc/bind.cpp); pymerge.backends.native is the typed way in."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

class Run:
    def __init__(
        self,
        jobs: NDArray[Any],
        keys: NDArray[Any],
        inputs: NDArray[Any],
        outs: NDArray[Any],
        rules: Sequence[Mapping[str, object]],
        groups: Sequence[Sequence[int]],
        files: Sequence[int],
        settings: Mapping[str, object],
        given: Sequence[Sequence[tuple[int, int]]],
    ) -> None: ...
    def execute(self) -> tuple[int, int, str] | None: ...
    def report(self) -> dict[str, int]: ...
    def cuts(self) -> list[list[tuple[int, int]]]: ...
    def bytes_done(self) -> int: ...
    def cancel(self) -> None: ...

def isa_available(isa: int) -> bool: ...
def best_isa() -> int: ...
