"""The CUDA kernels: tensors on one device go in as addresses, and all work is queued on torch's stream.

Nothing here waits for the device: thresholds, verdicts and the exact route are decided by kernels. All memory
is taken before the first result is written, so that a merge that does not fit leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pymerge.backends.philox import tensor_key
from pymerge.errors import BackendError
from pymerge.rule import Rule, Scope, ThresholdTies, Trim, check_rule

TRIMS = {Trim.NONE: 0, Trim.MAGNITUDE: 1, Trim.RANDOM: 2, Trim.OUTLIERS: 3}
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LINE = 256  # alignment of everything in the workspace


@dataclass(frozen=True, slots=True)
class Knobs:
    """How the work is cut up; results never depend on it.

    `piece`: elements a block takes at a time, a multiple of 8. `samples`: per expert, a multiple of 32.
    `capacity`: undecided entries of one expert that find room, None for what groups of this size need.
    `sigmas`: half width of the bracket in standard errors. `bias` shifts the bracket by this share of the
    ranks: tests force a miss with it. `small`: elements up to which tensors share launches.
    """

    piece: int = 16384
    samples: int = 1 << 15
    capacity: int | None = None
    sigmas: float = 4.0
    bias: float = 0.0
    small: int = 1 << 17


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor: its inputs in the kernels' element type, base first where there is one, and its result."""

    name: str
    inputs: tuple[Tensor, ...]
    out: Tensor

    @property
    def count(self) -> int:
        return int(self.out.numel())


@dataclass(slots=True)
class Batch:
    """Jobs of one element type that are merged in one go, and what the kernels are told of them."""

    jobs: Sequence[Job]
    own_cuts: bool
    table: Tensor = field(init=False)
    request: dict[str, object] = field(init=False)

    @property
    def code(self) -> int:
        """The number that the kernels know the element type by."""
        return KERNEL_DTYPES.index(self.jobs[0].out.dtype)


def load_kernels() -> ModuleType:
    """The compiled kernels; BackendError with what is missing where they were not built."""
    try:
        return import_module("pymerge._cuda")
    except ModuleNotFoundError:
        raise BackendError(
            "the cuda backend was not built: install the CUDA toolkit (nvcc) beside the card and reinstall"
            " pymerge-kernels"
        ) from None
    except ImportError as error:
        raise BackendError(f"the cuda backend was built, but cannot be loaded: {error}") from None


def available() -> str | None:
    """None if the kernels can run here, else what is missing."""
    if not torch.cuda.is_available():
        return "the cuda backend needs an NVIDIA device, its driver, and a torch that can use them"
    try:
        load_kernels()
    except BackendError as error:
        return str(error)
    return None


def merge_tensors(
    names: Sequence[str],
    inputs: Sequence[Sequence[Tensor]],
    outs: Sequence[Tensor],
    rule: Rule,
    *,
    knobs: Knobs | None = None,
    kernels: ModuleType | None = None,
    stream: int | None = None,
) -> None:
    """Merge every tensor into its `outs`; `inputs`: its base first where the rule has one, then the experts.

    All contiguous, on one device, f16, bf16 or f32 in any mix. Returns as soon as the work is queued.
    Raises BackendError for other element types, too many experts, or if the device has too little memory.
    """
    check_rule(rule, "cuda")
    module = kernels or load_kernels()
    chosen = knobs or Knobs()
    if len(rule.weights) > module.most_experts:
        raise BackendError(f"{len(rule.weights)} experts, but the cuda backend takes {module.most_experts}")
    device = outs[0].device if outs else torch.device("cpu")
    try:
        converted = _jobs(names, inputs, outs, rule)
        batches = _batches([job for job, _ in converted], rule, chosen)
        for batch in batches:
            _describe(batch, rule, chosen, module)
        needed = max((module.workspace_bytes(batch.request) for batch in batches), default=0)
        workspace = torch.empty(needed + LINE, dtype=torch.uint8, device=device)
        longest = max((job.count for job, out in converted if job.out is not out), default=0)
        mask = torch.empty(longest, dtype=torch.bool, device=device)
    except torch.OutOfMemoryError as error:
        said = str(error).split("\n")[0]
        raise BackendError(f"the device has too little memory for this merge: {said}") from None
    start = -workspace.data_ptr() % LINE + workspace.data_ptr()
    queue = torch.cuda.current_stream(device).cuda_stream if stream is None else stream
    requests = [batch.request | {"workspace": start, "stream": queue} for batch in batches]
    try:
        for batch, request in zip(batches, requests, strict=True):
            module.check(batch.code, request)
    except RuntimeError as error:  # nothing has run
        raise BackendError(f"the cuda backend cannot run on {device}: {error}") from None
    try:
        for batch, request in zip(batches, requests, strict=True):
            module.merge(batch.code, request)
    except RuntimeError as error:  # the device has failed since the check
        raise BackendError(f"{device} failed, and results may be half written: {error}") from None
    for job, out in converted:
        if job.out is not out:  # one NaN, not whichever
            flat, nan = job.out.view(-1), mask[: job.count]
            torch.ne(flat, flat, out=nan)
            out.view(-1).copy_(flat).masked_fill_(nan, float("nan"))


def work_bytes(
    sizes: Sequence[int], rule: Rule, *, knobs: Knobs | None = None, kernels: ModuleType | None = None
) -> int:
    """Device memory that `merge_tensors` takes beside tensors of these sizes, if all have one type."""
    module, chosen = kernels or load_kernels(), knobs or Knobs()
    groups = [(list(sizes), False)]
    if rule.scope is not Scope.MODEL and rule.trim.by_magnitude:
        groups = [([size], False) for size in sizes if size > chosen.small]
        groups.append(([size for size in sizes if size <= chosen.small], True))
    requests = [_request(group, own, rule, chosen, module) for group, own in groups if group]
    tables: int = LINE * len(groups) + 8 * len(sizes) * (module.columns + len(rule.weights))
    needed = [int(module.workspace_bytes(request)) for request in requests]
    return LINE + tables + max(needed, default=0)


def _jobs(
    names: Sequence[str], inputs: Sequence[Sequence[Tensor]], outs: Sequence[Tensor], rule: Rule
) -> list[tuple[Job, Tensor]]:
    """Each tensor in one element type: its own if all agree, else f32, which holds the others exactly."""
    uniform = [{x.dtype for x in (*row, out)} for row, out in zip(inputs, outs, strict=True)]
    for name, dtypes in zip(names, uniform, strict=True):
        for dtype in dtypes.difference(KERNEL_DTYPES):
            raise BackendError(f"tensor {name!r}: the cuda backend has no kernel for {str(dtype)[6:]}")
    together = rule.scope is Scope.MODEL and len(set().union(*uniform)) > 1
    jobs = []
    for name, row, out, dtypes in zip(names, inputs, outs, uniform, strict=True):
        if len(dtypes) == 1 and not together:
            jobs.append((Job(name, tuple(row), out), out))
        else:
            wide = tuple(x.to(torch.float32) for x in row)
            result = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            jobs.append((Job(name, wide, result), out))
    return jobs


def _batches(jobs: Sequence[Job], rule: Rule, knobs: Knobs) -> list[Batch]:
    jobs = [job for job in jobs if job.count]
    if rule.scope is Scope.MODEL:
        return [Batch(sorted(jobs, key=lambda job: job.name), own_cuts=False)] if jobs else []
    batches = []
    for dtype in KERNEL_DTYPES:
        alike = [job for job in jobs if job.out.dtype == dtype]
        if rule.trim.by_magnitude:
            batches += [Batch([job], own_cuts=False) for job in alike if job.count > knobs.small]
            alike = [job for job in alike if job.count <= knobs.small]
        if alike:
            batches.append(Batch(alike, own_cuts=rule.trim.by_magnitude))
    return batches


def _describe(batch: Batch, rule: Rule, knobs: Knobs, module: ModuleType) -> None:
    rows, origin, pieces, blocks = [], 0, 0, 0
    for job in batch.jobs:
        low, high = tensor_key(rule.seed, job.name)
        base, experts = (job.inputs[0], job.inputs[1:]) if rule.task_vector else (None, job.inputs)
        rows.append(
            [
                job.count,
                origin,
                pieces,
                blocks,
                low | high - (high >> 31 << 32) << 32,
                0 if base is None else base.data_ptr(),
                job.out.data_ptr(),
                *(expert.data_ptr() for expert in experts),
            ]
        )
        origin += job.count
        pieces += -(-job.count // knobs.piece)
        blocks += -(-job.count // module.reduce_block)
    batch.table = torch.tensor(rows, dtype=torch.int64).to(batch.jobs[0].out.device)
    counts = [job.count for job in batch.jobs]
    batch.request = _request(counts, batch.own_cuts, rule, knobs, module) | {"table": batch.table.data_ptr()}


def _request(
    counts: Sequence[int], own_cuts: bool, rule: Rule, knobs: Knobs, module: ModuleType
) -> dict[str, object]:
    """What kernels are told of tensors of these sizes, but for where they lie."""
    size = sum(counts)
    return _rule(rule) | {
        "table": 0,
        "tensors": len(counts),
        "size": size,
        "piece": knobs.piece,
        "pieces": sum(-(-count // knobs.piece) for count in counts),
        "blocks": sum(-(-count // module.reduce_block) for count in counts),
        "own_cuts": own_cuts,
        "samples": knobs.samples,
        "capacity": _capacity(size) if knobs.capacity is None else knobs.capacity,
        "sigmas": knobs.sigmas,
        "bias": knobs.bias,
        "workspace": 0,
        "stream": 0,
    }


def _capacity(size: int) -> int:
    """Room for several times the undecided of one expert: about 1 % at 1e6 elements, 0.1 % at 1e9."""
    return max(1 << 16, min(size // 16, (1 << 21) + size // 256))


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "task_vector": rule.task_vector,
        "elect": rule.elect,
        "normalize": rule.normalize,
        "rescale": rule.rescale and rule.trim is not Trim.NONE,
        "all_ties": rule.threshold_ties is ThresholdTies.ALL,
        "trim": TRIMS[rule.trim],
        "lambda": rule.lambda_,
        "weights": list(rule.weights),
        "late_weights": list(rule.late_weights),
        "densities": list(rule.densities),
        "gammas": list(rule.gammas),
    }
