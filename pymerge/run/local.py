"""Plans on this machine: shard after shard, hashed while the next one merges, published by one rename."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pymerge.backends.native import NativeRun, OpenFile, Report, Settings, available_cores
from pymerge.checkpoint.durable import writing
from pymerge.checkpoint.layout import ShardLayout
from pymerge.checkpoint.staging import Staging
from pymerge.job import TensorJob
from pymerge.planner import Plan
from pymerge.rule import Scope
from pymerge.run.attended import Run, attend
from pymerge.run.hasher import ShardHasher
from pymerge.run.inputs import check_file_limit, opened_inputs, raise_file_limit
from pymerge.run.progress import Progress, Silent
from pymerge.run.results import Summary, manifest, side_files

Start: TypeAlias = Callable[[Sequence[TensorJob], Scope, Sequence[OpenFile], Settings], Run]

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
    return execute_plans([plan], [out], settings, progress, start)[0]


def execute_plans(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    settings: Settings,
    progress: Progress | None = None,
    start: Start = NativeRun,
) -> list[Summary]:
    """The same for plans that differ in their rules alone, each into its folder; inputs are read together.

    `start` is for a single plan. Several are merged by the CPU; each summary has the seconds and the bytes
    read of all of them, and no count of undecided elements.
    """
    began = time.perf_counter()
    check_file_limit(plans, raise_file_limit())
    files = [side_files(plan, out) for plan, out in zip(plans, outs, strict=True)]
    progress = progress or Silent()
    progress.begin(sum(plan.bytes_read for plan in plans))
    with ExitStack() as stack:
        outputs = [
            _Output(plan, stack.enter_context(Staging.open(out, plan.digest())))
            for plan, out in zip(plans, outs, strict=True)
        ]
        with _spill(plans[0], settings, outputs[0].staging.folder) as settings_here:
            runner = _Runner(outputs, settings_here, progress, start)
            if plans[0].scope is Scope.MODEL:
                runner.merge_model()
            else:
                runner.merge_shards()
        seconds = time.perf_counter() - began
        summaries = []
        for output, beside, out in zip(outputs, files, outs, strict=True):
            summary = output.summary(out, seconds, runner.bytes_read)
            output.staging.publish(beside, manifest(output.plan, summary))
            summaries.append(summary)
    return summaries


@dataclass
class _Output:
    """One plan, where its merge goes, and what was counted of it."""

    plan: Plan
    staging: Staging

    def __post_init__(self) -> None:
        self.bytes_written = 0
        self.resumed = 0
        self.counts: dict[str, int | None] = dict.fromkeys(COUNTS, 0)

    def take_over(self, numbers: Sequence[int]) -> bool:
        """Whether an earlier run has finished all these shards; if so, what it did counts."""
        records = [self.staging.done(self.plan.layouts[number]) for number in numbers]
        if not all(records):
            return False
        for record in records:
            self.count(record or {})
        self.resumed += len(records)
        return True

    def count(self, record: Mapping[str, Any]) -> None:
        """Add what one shard's done record says."""
        for name in COUNTS:
            so_far, more = self.counts[name], record.get(name, 0)
            self.counts[name] = None if so_far is None or more is None else so_far + int(more)

    def summary(self, out: Path, seconds: float, bytes_read: int) -> Summary:
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
            bytes_read=bytes_read,
            bytes_written=self.bytes_written,
            seconds=seconds,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            undecided=self.counts["undecided"],
            fallbacks=self.counts["fallbacks"],
            nan_outputs=self.counts["nan_outputs"] or 0,
            on_cpu=self.counts["on_cpu"] or 0,
            notes=plan.notes,
        )


class _Part(NamedTuple):
    """One shard of one output, being written to `fd`."""

    output: _Output
    number: int
    fd: int

    @property
    def layout(self) -> ShardLayout:
        return self.output.plan.layouts[self.number]

    @property
    def jobs(self) -> tuple[TensorJob, ...]:
        return self.output.plan.jobs[self.number]

    def file(self, number: int) -> OpenFile:
        """Known by `number`."""
        return OpenFile(number, str(self.output.staging.folder / self.layout.file_name), self.fd)

    def finish(self, record: Mapping[str, Any]) -> None:
        """All bytes are written."""
        self.output.staging.finish(self.layout, self.fd, record)


@dataclass
class _Runner:
    """Merges the shards of all outputs, side by side where there are several."""

    outputs: Sequence[_Output]
    settings: Settings
    progress: Progress
    start: Start

    def __post_init__(self) -> None:
        self.plan = self.outputs[0].plan
        self.workers = min(len(self.outputs), available_cores())
        self.done_bytes = 0
        self.bytes_read = 0

    def merge_shards(self) -> None:
        """Scope tensor: one run for each output shard; the shard before is flushed and hashed meanwhile."""
        # What is left to hash when the last merge ends would keep but one processor busy.
        with ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="finish") as finisher:
            pending: list[Future[None]] = []
            for number in range(len(self.plan.layouts)):
                parts = [part for (part,) in self._created([number])]
                if not parts:
                    continue
                hashers = [ShardHasher(part.fd, part.jobs) for part in parts]
                report = self._run([[part] for part in parts], hashers)
                _wait(pending)
                for part, hasher, record in zip(parts, hashers, _records(parts, report), strict=True):
                    part.output.count(record)
                    pending.append(finisher.submit(_finish, part, hasher, record))
            _wait(pending)

    def merge_model(self) -> None:
        """Scope model: one run over all output shards, because their thresholds hang together."""
        numbers = range(len(self.plan.layouts))
        rows = self._created(numbers)
        if not rows:
            return
        report = self._run(rows)
        for number in numbers:
            parts = [row[number] for row in rows]
            # The counts of the whole stand with the first shard, so that their sum is right.
            for part, record in zip(parts, _records(parts, report if number == 0 else None), strict=True):
                part.output.count(record)
                part.finish(record)

    def _created(self, numbers: Sequence[int]) -> list[list[_Part]]:
        """The files of these shards, for each output that has not finished them, their space reserved."""

        def create(output: _Output) -> list[_Part]:
            layouts = output.plan.layouts
            return [_Part(output, number, output.staging.create(layouts[number])) for number in numbers]

        outputs = self._unfinished(numbers)
        if len(outputs) < 2:
            return [create(output) for output in outputs]
        # Memory file systems clear what is reserved: a tenth of a second for 300 MB.
        with ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="create") as pool:
            return list(pool.map(create, outputs))

    def _unfinished(self, numbers: Sequence[int]) -> list[_Output]:
        """The outputs whose shards of these numbers an earlier run has not all finished."""
        waiting = []
        for output in self.outputs:
            if output.take_over(numbers):
                self._advance(output.plan, numbers)
            else:
                waiting.append(output)
        return waiting

    def _run(self, rows: Sequence[Sequence[_Part]], hashers: Sequence[ShardHasher] = ()) -> Report:
        """`rows`: for each output the parts that are written together."""
        plan, stride = self.plan, len(self.plan.layouts)
        jobs = [[job for part in row for job in part.jobs] for row in rows]
        with opened_inputs(plan, jobs[0]) as inputs:
            # Every plan numbers its output files from the same number on; here each needs its own.
            outputs = [
                part.file(len(plan.shards) + variant * stride + part.number)
                for variant, row in enumerate(rows)
                for part in row
            ]
            files = [*inputs, *outputs]
            others = [
                [_moved(job, variant * stride) for job in jobs[variant]] for variant in range(1, len(rows))
            ]
            if others:
                run: Run = NativeRun(jobs[0], plan.scope, files, self.settings, variants=others)
            else:
                run = self.start(jobs[0], plan.scope, files, self.settings)

            def look() -> None:
                finished = run.finished if hashers else 0
                for hasher in hashers:
                    hasher.follow(finished)
                self.progress.update(self.done_bytes + run.bytes_done)

            report = attend(run, look)
        for row in rows:
            row[0].output.bytes_written += report.bytes_written // len(rows)
        self.bytes_read += report.bytes_read
        for row in rows:
            self._advance(row[0].output.plan, [part.number for part in row])
        return report

    def _advance(self, plan: Plan, numbers: Iterable[int]) -> None:
        """These shards of one output are done."""
        self.done_bytes += sum(plan.shard_bytes[number] for number in numbers)
        self.progress.update(self.done_bytes)


def _moved(job: TensorJob, by: int) -> TensorJob:
    """The job with its output in a file whose number is `by` higher."""
    return replace(job, out=job.out._replace(file=job.out.file + by))


def _records(parts: Sequence[_Part], report: Report | None) -> list[dict[str, Any]]:
    """What a done record of each part says. What was counted of several outputs together is None."""
    counts: dict[str, Any] = {name: getattr(report, name) if report else 0 for name in COUNTS}
    records = [{"tensors": len(part.jobs), **counts} for part in parts]
    if report and len(parts) > 1:
        for record, nan in zip(records, report.nan_of, strict=True):
            record |= {"undecided": None, "fallbacks": None, "nan_outputs": nan}
    return records


def _finish(part: _Part, hasher: ShardHasher, record: Mapping[str, Any]) -> None:
    part.finish({**record, "sha256": hasher.digest()})


def _wait(pending: list[Future[None]]) -> None:
    while pending:
        pending.pop(0).result()


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
