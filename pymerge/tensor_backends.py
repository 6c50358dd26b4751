"""Who merges tensors in memory: the compiled core, a GPU's kernels, or the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pymerge.backends.arrays import TORCH, Array, ArrayKind, dtype_of
from pymerge.dtypes import DType
from pymerge.errors import BackendError, RecipeError
from pymerge.job import Region, TensorJob, row_of
from pymerge.operands import Operands, Stack, stacked
from pymerge.options import as_count, as_float_dtype, as_member
from pymerge.rule import Rule, check_rule

if TYPE_CHECKING:
    from pymerge.backends.native import Report, Threshold

# More, and float64, are left to the reference where nobody asks for a backend.
MOST_EXPERTS = 64
# The undecided positions of tensors in memory may take this part of the inputs' size (they need half of it).
LIST_SHARE = 8


class Backend(Enum):
    """Who computes: the compiled CPU core, kernels on a GPU, or the reference that defines the result."""

    CPU = "cpu"
    CUDA = "cuda"
    REFERENCE = "reference"
    TRITON = "triton"


class Wanted(NamedTuple):
    """What the caller asked for, checked. `threads`: None for every core; `dtype`: of the results."""

    backend: Backend | None
    threads: int | None
    dtype: DType | None

    @classmethod
    def of(cls, backend: object, threads: object, dtype: object) -> Wanted:
        """From the options of the in-memory API. Raises RecipeError."""
        workers = None if threads is None else as_count(threads, "threads")
        if workers is not None and workers < 1:
            raise RecipeError(f"threads is {workers}, expected at least 1, or None for every core")
        return cls(
            None if backend is None else as_member(Backend, backend, "backend"),
            workers,
            None if dtype is None else as_float_dtype(dtype, "out_dtype"),
        )


def merge_operands(
    operands: Operands,
    rules: Sequence[Rule],
    outs: Sequence[object | None],
    wanted: Wanted,
    thresholds: Sequence[Sequence[Threshold]] = (),
) -> tuple[list[object], Report | None]:
    """The merge by each rule, of one scope all, built as the inputs are; into `outs`, or new where None.

    `thresholds`: as `run_variants` takes them; the report is of the compiled core, if that merged.
    """
    kind = operands.kind
    wide = wanted.dtype is DType.F64 or DType.F64 in operands.dtypes.values()
    for rule in rules:
        if wanted.backend in (Backend.CUDA, Backend.TRITON):
            check_rule(rule, wanted.backend.value)
    few = max(len(rule.weights) for rule in rules) <= MOST_EXPERTS
    has_kernels = all(rule.has_kernels for rule in rules) and not wide and few
    chosen = choose_backend(wanted.backend, operands.device, has_kernels)
    variants = stacked(operands, outs, wanted.dtype)
    merged = []
    for stacks, rule in zip(variants, rules, strict=True):
        # The core copies by itself where a rule says so.
        copying = rule.copy and chosen is not Backend.CPU
        copied = {stack.name for stack in stacks if _is_copy(stack, operands.dtypes[stack.name], copying)}
        merged.append([stack for stack in stacks if stack.name not in copied])
        for stack in stacks:
            if stack.name in copied:
                kind.copy(stack.inputs[0], stack.out)
    report = None
    if chosen is Backend.CPU:
        report = run_variants(merged, rules, kind, wanted.threads, thresholds)
    else:
        for stacks, rule in zip(merged, rules, strict=True):
            _RUNS[chosen](stacks, rule, kind)
    is_dict = isinstance(operands.first.value, Mapping)
    results = ({stack.name: stack.out for stack in stacks} for stacks in variants)
    return [result if is_dict else result[""] for result in results], report


def _is_copy(stack: Stack, dtype: DType, copying: bool) -> bool:
    """Whether the first input's bytes are the result."""
    return not dtype.mergeable or (copying and dtype_of(stack.inputs[0]) is dtype_of(stack.out))


def choose_backend(wanted: Backend | None, device: str, has_kernels: bool = True) -> Backend:
    """The backend for tensors on `device`; BackendError if the wanted one does not take them.

    `has_kernels`: whether the kernels for GPUs take the types and the number of experts.
    """
    on_cpu = device == "cpu"
    if wanted is None:
        if on_cpu:
            return Backend.CPU
        return _best_on(device) if has_kernels else Backend.REFERENCE
    if wanted is Backend.CPU and not on_cpu:
        raise BackendError(f"the tensors lie on {device}; the cpu backend takes tensors on the CPU")
    if wanted is Backend.CUDA:
        _check_cuda(device)
    if wanted is Backend.TRITON:
        _check_triton(device)
    return wanted


def _best_on(device: str) -> Backend:
    if device.startswith("cuda") and _missing_for_cuda() is None:
        return Backend.CUDA
    triton = device.startswith("cuda") and find_spec("triton") is not None
    return Backend.TRITON if triton else Backend.REFERENCE


def _missing_for_cuda() -> str | None:
    if find_spec("torch") is None:
        return "the cuda backend needs torch; install pymerge-kernels[torch]"
    from pymerge.backends import cuda

    return cuda.available()


def _check_cuda(device: str) -> None:
    """BackendError if the CUDA kernels cannot run on `device` here."""
    missing = _missing_for_cuda()
    if missing is not None:
        raise BackendError(missing)
    if not device.startswith("cuda"):
        raise BackendError(f"the tensors lie on {device}; the cuda backend takes tensors on NVIDIA devices")


def _check_triton(device: str) -> None:
    """BackendError if Triton kernels cannot run on `device` here."""
    if find_spec("triton") is None or find_spec("torch") is None:
        raise BackendError("the triton backend needs torch and triton; install pymerge-kernels[triton]")
    import triton

    if device.startswith("cuda") or (device == "cpu" and triton.knobs.runtime.interpret):
        return
    where = (
        "on the CPU they run only in its interpreter, with TRITON_INTERPRET=1 set" if device == "cpu" else ""
    )
    raise BackendError(
        f"the tensors lie on {device}; Triton kernels need a GPU{'; ' + where if where else ''}"
    )


def run_variants(
    variants: Sequence[Sequence[Stack]],
    rules: Sequence[Rule],
    kind: ArrayKind,
    threads: int | None,
    thresholds: Sequence[Sequence[Threshold]] = (),
) -> Report:
    """Merge the same inputs by several rules with the compiled core, into the results of each variant.

    `thresholds`: per tensor (per model, for that scope) and variant, as an earlier report has them.
    """
    from pymerge.backends.native import NativeRun, Settings

    def region(array: Array) -> Region:
        return Region(dtype_of(array), kind.span(array)[0])

    inputs = [tuple(region(array) for array in stack.inputs) for stack in variants[0]]
    counts = [kind.count(stack.inputs[0]) for stack in variants[0]]
    size = sum(n * sum(r.dtype.itemsize for r in row) for n, row in zip(counts, inputs, strict=True))

    def jobs(stacks: Sequence[Stack], rule: Rule) -> list[TensorJob]:
        first = int(rule.task_vector)
        return [
            TensorJob(
                name=stack.name,
                count=count,
                base=regions[0] if first else None,
                experts=regions[first:],
                out=region(stack.out),
                rule=rule,
                row=row_of(kind.shape(stack.out), rule),
            )
            for stack, count, regions in zip(stacks, counts, inputs, strict=True)
        ]

    settings = Settings(threads=threads or 0, memory=max(Settings.memory, size // LIST_SHARE))
    first, *others = map(jobs, variants, rules)
    return NativeRun(first, rules[0].scope, [], settings, thresholds, others).execute()


def _run_reference(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind) -> None:
    try:
        import torch
    except ImportError:
        raise BackendError("the reference backend needs torch; install pymerge-kernels[torch]") from None
    from pymerge.backends.reference import merge_group

    inputs = [[kind.as_torch(array) for array in stack.inputs] for stack in stacks]
    outs = [kind.as_torch(stack.out) for stack in stacks]
    with torch.inference_mode():
        merged = merge_group(
            [stack.name for stack in stacks],
            [row[0] for row in inputs] if rule.task_vector else None,
            [row[1:] if rule.task_vector else row for row in inputs],
            rule,
            [out.dtype for out in outs],
        )
    for out, tensor in zip(outs, merged, strict=True):
        TORCH.copy(tensor, out)


def _run_cuda(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind) -> None:
    import torch

    from pymerge.backends import cuda

    if not stacks:
        return
    outs = [kind.as_torch(stack.out) for stack in stacks]
    inputs = [[kind.as_torch(array) for array in stack.inputs] for stack in stacks]
    with torch.inference_mode(), torch.cuda.device(outs[0].device):
        cuda.merge_tensors([stack.name for stack in stacks], inputs, outs, rule)


def _run_triton(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind) -> None:
    import torch

    from pymerge.backends.triton import merge_group

    inputs = [[kind.as_torch(array) for array in stack.inputs] for stack in stacks]
    with torch.inference_mode():
        merge_group(
            [stack.name for stack in stacks],
            [row[0] for row in inputs] if rule.task_vector else None,
            [row[1:] if rule.task_vector else row for row in inputs],
            [kind.as_torch(stack.out) for stack in stacks],
            rule,
        )


_RUNS: Mapping[Backend, Callable[[Sequence[Stack], Rule, ArrayKind], None]] = MappingProxyType(
    {
        Backend.CUDA: _run_cuda,
        Backend.REFERENCE: _run_reference,
        Backend.TRITON: _run_triton,
    }
)
