"""One plan on this machine: shard after shard, hashed while the next one merges, published by one rename."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from pymerge.backends.native import NativeRun, OpenFile, Report, Settings
from pymerge.checkpoint.durable import writing
from pymerge.checkpoint.header import Header
from pymerge.checkpoint.layout import ShardLayout
from pymerge.checkpoint.staging import Staging
from pymerge.errors import CheckpointError
from pymerge.files import open_regular
from pymerge.job import TensorJob, regions_of
from pymerge.planner import Plan, bytes_read_by
from pymerge.rule import Scope
from pymerge.run.hasher import ShardHasher
from pymerge.run.progress import Progress, Silent
from pymerge.run.results import Summary, manifest, side_files


class Run(Protocol):
    """One run over a list of jobs; `execute` blocks, the others are called from another thread meanwhile."""

    def execute(self) -> Report:
        """Merges every job."""

    @property
    def bytes_done(self) -> int:
        """Input bytes read so far."""

    @property
    def finished(self) -> int:
        """How many of the leading jobs have their final output."""

    def cancel(self) -> None:
        """Makes `execute` raise Cancelled soon."""


Start: TypeAlias = Callable[[Sequence[TensorJob], Scope, Sequence[OpenFile], Settings], Run]

POLL_SECONDS = 0.02
FIRST_POLL_SECONDS = 0.0005  # doubled each time: a tiny shard must not cost a whole poll
SETTLE_SECONDS = 0.01
# What a done record keeps of a report, so that a resumed run can tell the whole.
COUNTS = ("undecided", "fallbacks", "nan_outputs", "on_cpu")


def execute_plan(
    plan: Plan,
    out: Path,
    settings: Settings,
    progress: Progress | None = None,
    start: Start = NativeRun,
) -> Summary:
    """Merge into the folder `out`; shards that an interrupted run of the same plan finished are kept.

    `start` makes the run of a list of jobs. Raises PymergeError; on
    KeyboardInterrupt or any other exception the run is cancelled, and the staging folder stays.
    """
    began = time.perf_counter()
    _raise_file_limit()
    files = side_files(plan, out)
    progress = progress or Silent()
    progress.begin(plan.bytes_read)
    with Staging.open(out, plan.digest()) as staging:
        with _spill(plan, settings, staging.folder) as settings_here:
            runner = _Runner(plan, staging, settings_here, progress, start)
            if plan.scope is Scope.MODEL:
                runner.merge_model()
            else:
                runner.merge_shards()
        summary = runner.summary(out, time.perf_counter() - began)
        staging.publish(files, manifest(plan, summary))
    return summary


@dataclass
class _Runner:
    plan: Plan
    staging: Staging
    settings: Settings
    progress: Progress
    start: Start

    def __post_init__(self) -> None:
        self.done_bytes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.resumed = 0
        self.counts: dict[str, int | None] = dict.fromkeys(COUNTS, 0)

    def merge_shards(self) -> None:
        """Scope tensor: one run for each output shard; the shard before is flushed and hashed meanwhile."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish") as finisher:
            pending: Future[None] | None = None
            for number, layout in enumerate(self.plan.layouts):
                if record := self.staging.done(layout):
                    self._count(record)
                    self._skip(number)
                    continue
                fd = self.staging.create(layout)
                hasher = ShardHasher(fd, self.plan.jobs[number])
                report = self._run(self.plan.jobs[number], {number: fd}, hasher)
                if pending is not None:
                    pending.result()
                record = self._record(number, report)
                self._count(record)
                pending = finisher.submit(self._finish, layout, fd, hasher, record)
            if pending is not None:
                pending.result()

    def _finish(self, layout: ShardLayout, fd: int, hasher: ShardHasher, record: dict[str, Any]) -> None:
        self.staging.finish(layout, fd, record | {"sha256": hasher.digest()})

    def merge_model(self) -> None:
        """Scope model: one run over all output shards, because their thresholds hang together."""
        layouts = self.plan.layouts
        records = [self.staging.done(layout) for layout in layouts]
        if all(records):
            for number, record in enumerate(records):
                self._count(record or {})
                self._skip(number)
            return
        fds = {number: self.staging.create(layout) for number, layout in enumerate(layouts)}
        report = self._run([job for jobs in self.plan.jobs for job in jobs], fds)
        for number, layout in enumerate(layouts):
            # The counts of the whole stand with the first shard, so that their sum is right.
            record = self._record(number, report if number == 0 else None)
            self._count(record)
            self.staging.finish(layout, fds[number], record)

    def summary(self, out: Path, seconds: float) -> Summary:
        """The result in numbers."""
        plan = self.plan
        return Summary(
            out=str(out),
            method=plan.method.name,
            scope=plan.scope.value,
            experts=plan.experts,
            tensors=plan.tensors,
            elements=plan.elements,
            shards=len(plan.layouts),
            shards_resumed=self.resumed,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            seconds=seconds,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            undecided=self.counts["undecided"],
            fallbacks=self.counts["fallbacks"],
            nan_outputs=self.counts["nan_outputs"] or 0,
            on_cpu=self.counts["on_cpu"] or 0,
            notes=plan.notes,
        )

    def _run(
        self, jobs: Sequence[TensorJob], outputs: Mapping[int, int], hasher: ShardHasher | None = None
    ) -> Report:
        with _open_files(self.plan, jobs, outputs, self.staging.folder) as files:
            run = self.start(jobs, self.plan.scope, files, self.settings)
            report = self._watch(run, hasher)
        self.done_bytes += bytes_read_by(jobs)
        self.bytes_read += report.bytes_read
        self.bytes_written += report.bytes_written
        self.progress.update(self.done_bytes)
        return report

    def _watch(self, run: Run, hasher: ShardHasher | None) -> Report:
        """Execute in a thread of its own, so that this one shows progress and hears Ctrl-C."""
        worker = _Worker(run)
        worker.thread.start()
        pause = FIRST_POLL_SECONDS
        try:
            while not worker.ended:
                time.sleep(pause)
                pause = min(2 * pause, POLL_SECONDS)
                if hasher is not None:
                    hasher.follow(run.finished)
                self.progress.update(self.done_bytes + run.bytes_done)
        except BaseException:
            # The descriptors must outlive the worker, whatever else the user presses.
            while not worker.ended:
                with suppress(BaseException):
                    run.cancel()
                    time.sleep(SETTLE_SECONDS)
            raise
        return worker.result()

    def _record(self, number: int, report: Report | None) -> dict[str, Any]:
        counts = {name: getattr(report, name) if report else 0 for name in COUNTS}
        return {"tensors": len(self.plan.jobs[number]), **counts}

    def _count(self, record: Mapping[str, Any]) -> None:
        for name in COUNTS:
            so_far, more = self.counts[name], record.get(name, 0)
            self.counts[name] = None if so_far is None or more is None else so_far + int(more)

    def _skip(self, number: int) -> None:
        self.resumed += 1
        self.done_bytes += bytes_read_by(self.plan.jobs[number])
        self.progress.update(self.done_bytes)


@contextmanager
def _spill(plan: Plan, settings: Settings, folder: Path) -> Iterator[Settings]:
    """The settings with a nameless file for undecided positions beside the output, where a trim needs one."""
    if not plan.method.trim.by_magnitude:
        yield settings
        return
    import tempfile  # late: 5 ms

    with ExitStack() as stack:
        with writing(folder):
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
        yield replace(settings, spill=file.fileno())


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


@contextmanager
def _open_files(
    plan: Plan, jobs: Sequence[TensorJob], outputs: Mapping[int, int], folder: Path
) -> Iterator[list[OpenFile]]:
    """The files that the jobs name: their inputs opened for reading, and the given outputs.

    Raises CheckpointError when an input is not the file that was planned with.
    """
    sources = (source for job in jobs for source in job.inputs)
    needed = {region.file for source in sources for region in regions_of(source)}
    with ExitStack() as stack:
        files = []
        for number in sorted(needed):
            shard = plan.shards[number]
            fd = _open_input(shard.path, shard.header)
            stack.callback(os.close, fd)
            files.append(OpenFile(number, str(shard.path), fd))
        inputs = tuple(files)
        for number, fd in outputs.items():
            path = folder / plan.layouts[number].file_name
            files.append(OpenFile(len(plan.shards) + number, str(path), fd))
        yield files
        for file in inputs:
            shard = plan.shards[file.number]
            _check_unchanged(file.fd, shard.path, shard.header)


def _open_input(path: Path, header: Header) -> int:
    fd = open_regular(path)
    try:
        _check_unchanged(fd, path, header)
    except CheckpointError:
        os.close(fd)
        raise
    return fd


def _check_unchanged(fd: int, path: Path, header: Header) -> None:
    state, size = os.fstat(fd), header.file_size
    if (state.st_size, state.st_mtime_ns) == (size, header.mtime_ns):
        return
    what = (
        f"it has {state.st_size:,} bytes, expected {size:,}" if state.st_size != size else "its time differs"
    )
    raise CheckpointError(f"{path} was changed after the merge was planned: {what}")


def _raise_file_limit() -> None:
    """Many experts of many shards are open together; the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
