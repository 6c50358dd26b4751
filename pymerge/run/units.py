"""How a run on a device is cut up: into units, each merged by one call, and these into chunks of a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from pymerge.dtypes import DType
from pymerge.job import Region, TensorJob
from pymerge.rule import Rule, Scope

# Bytes, at most, that kernels take beside inputs and results to merge tensors of these sizes.
WorkBytes: TypeAlias = Callable[[Sequence[int], Rule], int]

DEVICE_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})
ALIGNMENT = 256  # of every tensor in a slot; vector loads need 16
UNIT_BYTES = 64 << 20  # small tensors are merged together up to this: a millisecond and more of PCIe
MOST_SLOTS = 3  # one is filled, one is merged, one is written


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes of a file, from `start`, which lie at byte `at` of a slot; they belong to job `job`."""

    at: int
    size: int
    file: int
    start: int
    job: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Jobs that one call merges. `inputs`: the base (where there is one) of every job, then expert by expert.

    `size`: bytes of a slot that holds inputs and results. `work`: bytes that merging may take beside it.
    """

    jobs: tuple[int, ...]
    inputs: tuple[Span, ...]
    outs: tuple[Span, ...]
    size: int
    work: int


@dataclass(frozen=True, slots=True)
class Division:
    """`units` go through `slots` slots of the device; `left` are the jobs that the CPU merges or copies."""

    units: tuple[Unit, ...]
    slots: int
    left: tuple[int, ...]


def divide(
    jobs: Sequence[TensorJob], scope: Scope, room: int, work: WorkBytes, unit_bytes: int = UNIT_BYTES
) -> Division:
    """Units of `jobs` for a device with `room` bytes free; what it cannot take is left."""
    taken = [number for number, job in enumerate(jobs) if _has_kernels(job)]
    if scope is Scope.MODEL:
        # Thresholds hang together, so it is all or nothing.
        floats = [number for number, job in enumerate(jobs) if job.rule is not None and job.count]
        runs = [taken] if taken and taken == floats else []
    else:
        runs = list(_runs(jobs, taken, min(unit_bytes, room // 4)))
    units = [_unit(jobs, numbers, work) for numbers in runs]
    while units and room < max(unit.size for unit in units) + max(unit.work for unit in units):
        units.remove(max(units, key=lambda unit: unit.size + unit.work))
    slots = 0
    if units:
        largest, beside = max(unit.size for unit in units), max(unit.work for unit in units)
        slots = min(MOST_SLOTS, len(units), (room - beside) // largest)
    on_device = {number for unit in units for number in unit.jobs}
    return Division(tuple(units), slots, tuple(n for n in range(len(jobs)) if n not in on_device))


def chunks(spans: Sequence[Span], largest: int) -> Iterator[list[Span]]:
    """The spans, cut where needed, in lists that each take up at most `largest` bytes of the slot."""
    held: list[Span] = []
    for span in spans:
        rest = span
        while rest.size:
            room = (held[0].at if held else rest.at) + largest - rest.at
            if room > 0:
                part = replace(rest, size=min(room, rest.size))
                held.append(part)
                cut = part.size
                rest = replace(rest, at=rest.at + cut, start=rest.start + cut, size=rest.size - cut)
            if rest.size:
                yield held
                held = []
    if held:
        yield held


def _has_kernels(job: TensorJob) -> bool:
    if job.rule is None or not job.rule.has_kernels or job.count == 0:
        return False
    if not all(isinstance(source, Region) for source in job.inputs):
        return False
    dtypes = {region.dtype for region in (*job.inputs, job.out)} | ({job.cast} if job.cast else set())
    return dtypes <= DEVICE_DTYPES


def _runs(jobs: Sequence[TensorJob], numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbours of one rule together, up to `most` bytes; a larger tensor alone."""
    held: list[int] = []
    size = 0
    for number in numbers:
        job = jobs[number]
        more = sum(region.dtype.itemsize for region in (*job.inputs, job.out)) * job.count
        if held and (size + more > most or job.rule != jobs[held[0]].rule):
            yield held
            held, size = [], 0
        held.append(number)
        size += more
    if held:
        yield held


def _unit(jobs: Sequence[TensorJob], numbers: Sequence[int], work: WorkBytes) -> Unit:
    at = 0

    def placed(number: int, region: Region) -> Span:
        nonlocal at
        size = jobs[number].count * region.dtype.itemsize
        span = Span(at, size, region.file, region.start, number)
        at += -(-size // ALIGNMENT) * ALIGNMENT
        return span

    rows = {number: [r for r in jobs[number].inputs if isinstance(r, Region)] for number in numbers}
    width = max(map(len, rows.values()))
    inputs = tuple(placed(n, rows[n][i]) for i in range(width) for n in numbers if i < len(rows[n]))
    outs = tuple(placed(number, jobs[number].out) for number in numbers)
    rule = jobs[numbers[0]].rule
    assert rule is not None
    types = [_types_of(jobs[number]) for number in numbers]
    if rule.scope is Scope.MODEL:  # one threshold compares all of them, so one type serves all
        types = [frozenset().union(*types)] * len(types)
    converted = sum(_converted_bytes(jobs[n], several) for n, several in zip(numbers, types, strict=True))
    mask = max(jobs[number].count for number in numbers)  # which results are NaN
    beside = work([jobs[number].count for number in numbers], rule) + converted + mask
    return Unit(tuple(numbers), inputs, outs, at, beside)


def _types_of(job: TensorJob) -> frozenset[DType]:
    """The types that kernels see."""
    return frozenset({job.cast or region.dtype for region in job.inputs} | {job.out.dtype})


def _converted_bytes(job: TensorJob, types: frozenset[DType]) -> int:
    """Of the copies that are rounded to `cast`, and of those in f32 where types differ."""
    inputs = [region.dtype for region in job.inputs]
    width = job.cast.itemsize * sum(dtype is not job.cast for dtype in inputs) if job.cast else 0
    if len(types) > 1:
        width += DType.F32.itemsize * (len(inputs) + 1)
    return width * job.count
