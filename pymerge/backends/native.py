"""The compiled CPU backend: hands whole job lists to the core, which owns threads, tiles and files."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pymerge.backends.compounds import CompoundTable, dtype_code
from pymerge.backends.philox import tensor_key
from pymerge.collector import collector_paused
from pymerge.dtypes import DType
from pymerge.errors import BackendError, Cancelled, CheckpointError, OutputError
from pymerge.job import IN_MEMORY, TensorJob, regions_of
from pymerge.rule import Blend, Blending, Fuse, Fusing, Rule, Scope, ThresholdTies, Trim, Vectors

try:
    from pymerge import _core
except ImportError as error:
    raise BackendError(
        "pymerge's compiled core is missing: run Python outside the clone, or pip install -e . there"
    ) from error

_TRIM_CODE = {trim: code for code, trim in enumerate(Trim)}
_BLEND_CODE: dict[Blend | None, int] = {None: 0} | {blend: code for code, blend in enumerate(Blend, 1)}
_FUSE_CODE: dict[Fuse | None, int] = {None: 0} | {fuse: code for code, fuse in enumerate(Fuse, 1)}
_VECTORS_CODE = {vectors: code for code, vectors in enumerate(Vectors)}
_NO_FILE = -1


# More would only exhaust the system's process table.
MOST_THREADS = 1024


class Isa(Enum):
    """The instruction set the kernels run on; AUTO takes the best this processor has."""

    AUTO = -1
    SCALAR = 0
    AVX2 = 1
    AVX512 = 2


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; nothing here changes a bit of the result.

    `threads`: 0 for one per available core. `tile`: elements per step. `memory`: bytes for undecided
    positions before they go to `spill` (an open read-write file) or, without one, the exact two-pass route
    is taken. `cached`: bytes of inputs up to which a tensor is merged in the cache: loaded once, its cuts
    found, then mapped. `sigmas`: half width of the threshold bracket in standard errors. `bracket_bias`
    shifts the bracket by that share of the ranks, so that tests can force a miss. `drop_behind`: inputs are
    not needed again soon.
    """

    threads: int = 0
    tile: int = 32768
    memory: int = 64 << 20
    cached: int = 2 << 20
    isa: Isa = Isa.AUTO
    sigmas: float = 4.0
    bracket_bias: float = 0.0
    drop_behind: bool = False
    spill: int | None = None


class OpenFile(NamedTuple):
    """An open file, the number that regions know it by, and the name that messages give it."""

    number: int
    path: str
    fd: int


@dataclass(frozen=True)
class Threshold:
    """What is kept of an expert: magnitude bits above `magnitude`, or equal at a flat index below `index`."""

    magnitude: int
    index: int


@dataclass(frozen=True)
class Report:
    """What a run did. `fallbacks`: groups that took the exact two-pass route.

    `undecided` and `fallbacks` are None where a device has merged: it is not waited for to count them.
    `thresholds`: per group (the whole model, or each job in turn) and variant, one per expert; empty where
    none was searched. `nan_outputs`: of all variants together; `nan_of` has each variant's. `on_cpu`: tensors
    of floats that a backend on a device has left to this one.
    """

    bytes_read: int
    bytes_written: int
    elements: int
    undecided: int | None
    fallbacks: int | None
    nan_outputs: int
    cuts: Sequence[Sequence[tuple[int, int]]]
    on_cpu: int = 0
    nan_of: tuple[int, ...] = ()

    @property
    def thresholds(self) -> tuple[tuple[Threshold, ...], ...]:
        """Of each group and variant, by `cuts`: as `NativeRun` takes them again. Few callers want them."""
        return tuple(tuple(Threshold(*cut) for cut in group) for group in self.cuts)


def available_isas() -> list[Isa]:
    """The instruction sets this processor can run, slowest first."""
    return [isa for isa in Isa if isa is not Isa.AUTO and _core.isa_available(isa.value)]


def cpu_features() -> dict[str, object]:
    """What `pymerge info` shows of the processor."""
    return {
        "cores": available_cores(),
        "instruction sets": [isa.name.lower() for isa in available_isas()],
        "chosen": Isa(_core.best_isa()).name.lower(),
    }


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeRun:
    """One run over a list of jobs; `execute` blocks, the others may be called from other threads."""

    def __init__(
        self,
        jobs: Sequence[TensorJob],
        scope: Scope,
        files: Sequence[OpenFile],
        settings: Settings,
        thresholds: Sequence[Sequence[Threshold]] = (),
        variants: Sequence[Sequence[TensorJob]] = (),
    ) -> None:
        """`files`: those that the jobs' regions name.

        `thresholds`: those of an earlier run's report over the same inputs, which then need no search.
        `variants`: the same jobs again, but by other rules and into other outputs; what they have in common
        with the first is done once.
        """
        if not 0 <= settings.threads <= MOST_THREADS:
            raise BackendError(f"threads is {settings.threads}, expected 1 to {MOST_THREADS}")
        if settings.isa not in (Isa.AUTO, *available_isas()):
            known = ", ".join(isa.name.lower() for isa in available_isas())
            raise BackendError(f"this processor has no {settings.isa.name.lower()}; it has {known}")
        if scope is Scope.MODEL:
            _check_one_working_type(jobs)
        self._jobs = [*jobs, *(job for variant in variants for job in variant)]
        self._files = files
        with collector_paused():
            self._run = self._core_run(jobs, scope, files, settings, thresholds)

    def _core_run(
        self,
        jobs: Sequence[TensorJob],
        scope: Scope,
        files: Sequence[OpenFile],
        settings: Settings,
        thresholds: Sequence[Sequence[Threshold]],
    ) -> _core.Run:
        # The core numbers the files of this run alone.
        slots = {file.number: slot for slot, file in enumerate(files)} | {IN_MEMORY: _NO_FILE}
        rules = _RuleTable()
        rows = array("q", [number for job in self._jobs for number in _job_row(job, rules)])
        keys = array("Q", map(_key, self._jobs))
        compounds = CompoundTable(slots)
        inputs = compounds.regions(source for job in jobs for source in job.inputs)
        outs = compounds.regions(job.out for job in self._jobs)
        starts = range(0, len(self._jobs), len(jobs) or 1)
        families = [[[start + n for n in group] for start in starts] for group in _groups(jobs, scope)]
        fds = [file.fd for file in files]
        given = [[(cut.magnitude, cut.index) for cut in group] for group in thresholds]
        return _core.Run(
            rows,
            keys,
            inputs,
            outs,
            rules.rows,
            compounds.rows,
            families,
            fds,
            _settings_row(settings, jobs),
            given,
        )

    def execute(self) -> Report:
        """Merges every job. Raises CheckpointError or OutputError naming file and tensor, or Cancelled."""
        fault = self._run.execute()
        if fault is not None:
            raise self._explain(*fault)
        counted = self._run.report()
        return Report(
            bytes_read=counted["bytes_read"],
            bytes_written=counted["bytes_written"],
            elements=counted["elements"],
            undecided=counted["undecided"],
            fallbacks=counted["misses"] + counted["overflows"],
            nan_outputs=sum(counted["nan"]),
            cuts=self._run.cuts(),
            nan_of=tuple(counted["nan"]),
        )

    @property
    def bytes_done(self) -> int:
        """Input bytes read so far."""
        return self._run.bytes_done()

    @property
    def finished(self) -> int:
        """How many of the leading jobs of every variant have their final output."""
        return self._run.finished()

    def cancel(self) -> None:
        """Makes `execute` raise Cancelled soon."""
        self._run.cancel()

    def _explain(self, number: int, source: int, file: int, what: str) -> Exception:
        if not what:
            return Cancelled("the merge was cancelled")
        if number < 0:
            return OutputError(f"temporary file for undecided positions: {what}")
        job = self._jobs[number]
        region = job.out if source < 0 else next(regions_of(job.inputs[source]))
        paths = {known.number: known.path for known in self._files}
        place = self._files[file].path if file >= 0 else paths.get(region.file, "memory")
        error = OutputError if source < 0 else CheckpointError
        return error(f"{place}: tensor {job.name!r}: {what}")


class _RuleTable:
    """Numbers distinct rules, so that thousands of tensors share one row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._numbers: dict[Rule, int] = {}
        self._last: Rule | None = None
        self._number = 0

    def number(self, rule: Rule) -> int:
        if rule is self._last:  # to hash a rule takes longer than all else that is done for a job
            return self._number
        self._last, self._number = rule, self._numbers.setdefault(rule, len(self.rows))
        if self._number == len(self.rows):
            self.rows.append(_rule_row(rule))
        return self._number


def _rule_row(rule: Rule) -> dict[str, object]:
    return (
        _blend_row(rule.blend)
        | _fuse_row(rule.fuse)
        | {
            "task_vector": rule.task_vector,
            "trim": _TRIM_CODE[rule.trim],
            "elect": rule.elect,
            "normalize": rule.normalize,
            "rescale": rule.rescale,
            "all_ties": rule.threshold_ties is ThresholdTies.ALL,
            "lambda": rule.lambda_,
            "weights": list(rule.weights),
            "late_weights": list(rule.late_weights),
            "densities": list(rule.densities),
            "gammas": list(rule.gammas),
            "one_more": rule.one_more,
            "epsilons": list(rule.epsilons),
        }
    )


def _blend_row(blend: Blending | None) -> dict[str, object]:
    given = blend or Blending(Blend.SLERP)
    return {
        "blend": _BLEND_CODE[blend.kind if blend else None],
        "vectors": _VECTORS_CODE[given.vectors],
        "t": given.t,
        "eps": given.eps,
        "tol": given.tol,
        "max_iter": given.max_iter,
    }


def _fuse_row(fuse: Fusing | None) -> dict[str, object]:
    given = fuse or Fusing(Fuse.SWAP)
    return {
        "fuse": _FUSE_CODE[fuse.kind if fuse else None],
        "fuse_t": given.t,
        "boost": given.boost,
        "most_boost": given.most_boost,
        "votes": given.votes,
    }


def _job_row(job: TensorJob, rules: _RuleTable) -> tuple[int, int, int, int, int]:
    number = -1 if job.rule is None or job.is_copy else rules.number(job.rule)
    return job.count, number, dtype_code(job.cast), len(job.inputs), job.row


def _key(job: TensorJob) -> int:
    if job.rule is None or not job.rule.trim.drawn:
        return 0
    low, high = tensor_key(job.rule.seed, job.name)
    return low | high << 32


def _groups(jobs: Sequence[TensorJob], scope: Scope) -> list[list[int]]:
    """Job numbers that share thresholds: each alone, or all floats in sorted name order (as in the paper)."""
    if scope is Scope.TENSOR:
        return [[number] for number in range(len(jobs))]
    merged = [number for number, job in enumerate(jobs) if job.rule is not None]
    copied = [[number] for number, job in enumerate(jobs) if job.rule is None]
    return [sorted(merged, key=lambda number: jobs[number].name), *copied] if merged else copied


def _check_one_working_type(jobs: Sequence[TensorJob]) -> None:
    """One threshold compares magnitudes of all tensors, so all must be computed in one type."""
    first: dict[bool, TensorJob] = {}
    for job in jobs:
        if job.rule is not None:
            wide = DType.F64 in ({job.cast} if job.cast else {region.dtype for region in job.inputs})
            first.setdefault(wide, job)
    if len(first) == 2:
        wide_name, narrow_name = first[True].name, first[False].name
        raise BackendError(
            f"scope model: tensor {wide_name!r} is computed in float64, {narrow_name!r} in float32;"
            " give tensors of one type (a recipe's dtype makes them so)"
        )


def _settings_row(settings: Settings, jobs: Sequence[TensorJob]) -> dict[str, object]:
    # A thread takes 30 us to start, in which a small tensor is merged.
    tiles = sum(job.count // settings.tile + 1 for job in jobs)
    return {
        "isa": settings.isa.value,
        "threads": min(settings.threads or available_cores(), max(tiles, 1)),
        "tile": settings.tile,
        "memory": settings.memory,
        "cached": settings.cached,
        "sigmas": settings.sigmas,
        "bracket_bias": settings.bracket_bias,
        "drop_behind": settings.drop_behind,
        "spill": _NO_FILE if settings.spill is None else settings.spill,
    }
