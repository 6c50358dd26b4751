"""What a run tells while it runs: bytes done, speed, time left."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """Is told the bytes of the whole run once, then how many are done, as often as it likes."""

    def begin(self, total: int) -> None:
        """`total`: bytes that the run will read and write."""

    def update(self, done: int) -> None:
        """`done`: bytes read and written so far."""


class Silent:
    """Shows nothing."""

    def begin(self, total: int) -> None:
        """Nothing to do."""

    def update(self, done: int) -> None:
        """Nothing to do."""


class Bar:
    """A bar with bytes, GB/s and time left on a terminal; a context manager. Nothing elsewhere."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def begin(self, total: int) -> None:
        """Draw the bar, if the stream is a terminal."""
        if self._stream is None or not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("merging"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._task = self._bar.add_task("merging", total=total)
        self._bar.start()

    def update(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
