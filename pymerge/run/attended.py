"""A run in a thread of its own, so that this one shows progress and hears Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pymerge.backends.native import Report

POLL_SECONDS = 0.02
FIRST_POLL_SECONDS = 0.0005  # doubled each time: a tiny shard must not cost a whole poll
SETTLE_SECONDS = 0.01


class Run(Protocol):
    """One run over a list of jobs; `execute` blocks, the others are called from another thread meanwhile."""

    def execute(self) -> Report:
        """Merges every job."""

    @property
    def bytes_done(self) -> int:
        """Input bytes read so far."""

    @property
    def finished(self) -> int:
        """How many of the leading jobs (of every variant) have their final output."""

    def cancel(self) -> None:
        """Makes `execute` raise Cancelled soon."""


def attend(run: Run, look: Callable[[], None]) -> Report:
    """Execute to the end; `look` is called again and again meanwhile, and may break off by raising."""
    worker = _Worker(run)
    worker.thread.start()
    pause = FIRST_POLL_SECONDS
    try:
        while not worker.ended:
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
            look()
    except BaseException:
        # The descriptors must outlive the worker, whatever else the user presses.
        while not worker.ended:
            with suppress(BaseException):
                run.cancel()
                time.sleep(SETTLE_SECONDS)
        raise
    return worker.result()


class _Worker:
    """Runs the core in a thread; they share plain attributes only: a signal may break into a lock's wait."""

    def __init__(self, run: Run) -> None:
        self.thread = threading.Thread(target=self._execute, args=(run,), name="merge", daemon=True)
        self.ended = False
        self._report: Report | None = None
        self._error: BaseException | None = None

    def _execute(self, run: Run) -> None:
        try:
            self._report = run.execute()
        except BaseException as error:
            self._error = error
        self.ended = True

    def result(self) -> Report:
        if self._report is None:
            raise self._error or RuntimeError("the merge ended without a report")
        return self._report
