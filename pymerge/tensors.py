"""Merging tensors in memory: torch tensors on CPU or GPU, or numpy arrays, single or in dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypeVar, cast

from pymerge.backends.arrays import TORCH, Array, ArrayKind, dtype_of
from pymerge.dtypes import DType
from pymerge.errors import BackendError, ProblemList, RecipeError
from pymerge.job import Region, TensorJob, row_of
from pymerge.methods import Base, Method, method_named
from pymerge.operands import Stack, expert_list, read_operands, stacked
from pymerge.options import (
    PerExpert,
    as_count,
    as_flag,
    as_float_dtype,
    as_member,
    as_name,
    as_number,
    per_expert,
)
from pymerge.parameters import Preset
from pymerge.presets import adjusted, defaults_of
from pymerge.rule import Rule, Scope, ThresholdTies, check_rule
from pymerge.ruling import rule_for

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tensors = TypeVar(
        "Tensors",
        torch.Tensor,
        "np.ndarray[Any, Any]",
        Mapping[str, torch.Tensor],
        Mapping[str, "np.ndarray[Any, Any]"],
    )


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


def merge_tensors(
    base: Tensors | None,
    experts: Iterable[Tensors],
    *,
    method: str = "ties",
    preset: str = "mergekit",
    weight: PerExpert | None = None,
    density: PerExpert | None = None,
    gamma: PerExpert | None = None,
    epsilon: PerExpert | None = None,
    lambda_: SupportsFloat | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: str | None = None,
    scope: str | None = None,
    seed: SupportsIndex = 0,
    t: SupportsFloat | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    normalize_weights: bool = True,
    eps: SupportsFloat = 1e-8,
    max_iter: SupportsIndex = 10,
    tol: SupportsFloat = 1e-5,
    filter_wise: bool = False,
    scale: SupportsFloat = 1.0,
    r: SupportsFloat = 0.1,
    alpha: SupportsFloat = 0.2,
    select_topk: SupportsFloat = 1.0,
    claim: SupportsFloat = 0.4,
    votes: SupportsIndex = 2,
    out: Tensors | None = None,
    out_dtype: object = None,
    threads: SupportsIndex | None = None,
    backend: str | None = None,
) -> Tensors:
    """Merge `experts` (all of the base's shape, any mix of f16, bf16, f32, f64) and return the same kind.

    `base`, each of `experts`: a tensor, or a dict of tensors with the same names; never modified. `base` is
    None for `linear`; for `slerp` it is the model at t = 0; `nuslerp` and `multislerp` go without one or are
    relative to it; `karcher` and `passthrough` take it for one more expert. `weight` (1), `density`, `gamma`
    (the share that is outliers), `epsilon`: a number for all experts or one for each; None: the default of
    the method, or of `preset`: "mergekit", "paper", "peft" or "fusionbench", as in a recipe.
    Numbers may be scalars of numpy or torch.
    `threshold_ties`: "first" (default) keeps exactly int(density * n) entries, the lowest flat index first
    among equals, "all" keeps every |d| >= threshold. `scope`: "tensor" (default), or "model" for one
    threshold over a whole dict.
    `t` (slerp), `nuslerp_flatten` and `nuslerp_row_wise`, `normalize_weights` and `eps` (multislerp),
    `max_iter` and `tol` (karcher), `filter_wise` (model_stock), `scale` (passthrough), `epsilon` (della, for
    each expert; ram), `r` and `alpha` (ramplus_tl), `select_topk` (sce), `claim` and `votes` (consensus): as
    in a recipe.
    `out`: where to write, contiguous and apart from the inputs. `out_dtype`: element type of the result
    (default: the inputs' common type). `threads`: None uses every core. `backend`: "cpu",
    "cuda", "triton", "reference", or None for the best that takes the tensors.
    Raises RecipeError for wrong options, BackendError for inputs that no backend takes, CheckpointError where
    the inputs have no such mean.
    """
    row = method_named(as_name(method, "method"))
    members = _members(row, base, expert_list(experts))
    options: dict[str, object] = {
        "t": None if t is None else as_number(t, "t"),
        "nuslerp_flatten": as_flag(nuslerp_flatten, "nuslerp_flatten"),
        "nuslerp_row_wise": as_flag(nuslerp_row_wise, "nuslerp_row_wise"),
        "normalize_weights": as_flag(normalize_weights, "normalize_weights"),
        "eps": as_number(eps, "eps"),
        "max_iter": as_count(max_iter, "max_iter"),
        "tol": as_number(tol, "tol"),
        "filter_wise": as_flag(filter_wise, "filter_wise"),
        "scale": as_number(scale, "scale"),
        "r": as_number(r, "r"),
        "alpha": as_number(alpha, "alpha"),
        "select_topk": as_number(select_topk, "select_topk"),
        "claim": as_number(claim, "claim"),
        "votes": as_count(votes, "votes"),
    }
    if "epsilon" in row.own and epsilon is not None:
        options["epsilon"] = as_number(epsilon, "epsilon")
    count = len(members)
    if not row.weighted:
        weight, density = None, None
    defaults = defaults_of(as_member(Preset, preset, "preset"), row.name)
    densities = per_expert(_first(density, defaults.density, row.density), count, "density")
    weights, lambda_of_all, divided = adjusted(
        defaults,
        per_expert(_first(weight, 1.0), count, "weight"),
        densities,
        as_number(_first(lambda_, defaults.lambda_), "lambda_"),
        as_flag(rescale, "rescale"),
    )
    try:
        rule = rule_for(
            row,
            weights=weights,
            densities=densities,
            gammas=None if gamma is None else per_expert(gamma, count, "gamma"),
            epsilons=None if epsilon is None else per_expert(epsilon, count, "epsilon"),
            options=options,
            has_base=base is not None,
            lambda_=lambda_of_all,
            normalize=as_flag(_first(normalize, defaults.normalize), "normalize"),
            rescale=divided,
            threshold_ties=as_member(
                ThresholdTies, _first(threshold_ties, defaults.threshold_ties), "threshold_ties"
            ),
            scope=as_member(Scope, _first(scope, defaults.scope), "scope"),
            seed=as_count(seed, "seed"),
            one_more=defaults.one_more,
        )
    except ProblemList as several:
        raise RecipeError(several.problems[0]) from None
    workers = None if threads is None else as_count(threads, "threads")
    if workers is not None and workers < 1:
        raise RecipeError(f"threads is {workers}, expected at least 1, or None for every core")
    dtype = None if out_dtype is None else as_float_dtype(out_dtype, "out_dtype")
    wanted = None if backend is None else as_member(Backend, backend, "backend")
    if rule.task_vector and base is None:
        raise RecipeError(f"{row.name} works on task vectors, so it needs a base")

    operands = read_operands(base if rule.task_vector else None, members)
    wide = dtype is DType.F64 or DType.F64 in operands.dtypes.values()
    has_kernels = rule.has_kernels and not wide and len(members) <= MOST_EXPERTS
    if wanted in (Backend.CUDA, Backend.TRITON):
        check_rule(rule, wanted.value)
    chosen = choose_backend(wanted, operands.device, has_kernels)
    stacks = stacked(operands, out, dtype)
    kind = operands.kind
    copied = {stack.name for stack in stacks if _is_copy(stack, operands.dtypes[stack.name], rule)}
    _RUNS[chosen]([stack for stack in stacks if stack.name not in copied], rule, kind, workers)
    for stack in stacks:
        if stack.name in copied:
            kind.copy(stack.inputs[0], stack.out)
    results = {stack.name: stack.out for stack in stacks}
    return cast("Tensors", results if isinstance(operands.first.value, Mapping) else results[""])


def _members(row: Method, base: object | None, experts: list[Any]) -> list[Any]:
    """The experts as the method counts them: with the base where it is one of them."""
    if row.base is Base.FIRST and base is None:
        raise RecipeError(f"{row.name} needs a base: the tensors that t = 0 gives")
    if base is None or row.base not in (Base.FIRST, Base.MEMBER):
        return experts
    return [base, *experts] if row.base is Base.FIRST else [*experts, base]


def _first(*given: object) -> object:
    """The first that is not None; None where all are."""
    return next((value for value in given if value is not None), None)


def _is_copy(stack: Stack, dtype: DType, rule: Rule) -> bool:
    """Whether the first input's bytes are the result."""
    return not dtype.mergeable or (rule.copy and dtype_of(stack.inputs[0]) is dtype_of(stack.out))


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


def _run_native(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind, threads: int | None) -> None:
    from pymerge.backends.native import NativeRun, Settings

    def region(array: Array) -> Region:
        return Region(dtype_of(array), kind.span(array)[0])

    jobs, size = [], 0
    for stack in stacks:
        count = kind.count(stack.inputs[0])
        regions = tuple(region(array) for array in stack.inputs)
        base, experts = (regions[0], regions[1:]) if rule.task_vector else (None, regions)
        out, row = region(stack.out), row_of(kind.shape(stack.out), rule)
        jobs.append(TensorJob(stack.name, count, base, experts, out, rule, row=row))
        size += count * sum(source.dtype.itemsize for source in regions)
    settings = Settings(threads=threads or 0, memory=max(Settings.memory, size // LIST_SHARE))
    NativeRun(jobs, rule.scope, [], settings).execute()


def _run_reference(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind, threads: int | None) -> None:
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


def _run_cuda(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind, threads: int | None) -> None:
    import torch

    from pymerge.backends import cuda

    if not stacks:
        return
    outs = [kind.as_torch(stack.out) for stack in stacks]
    inputs = [[kind.as_torch(array) for array in stack.inputs] for stack in stacks]
    with torch.inference_mode(), torch.cuda.device(outs[0].device):
        cuda.merge_tensors([stack.name for stack in stacks], inputs, outs, rule)


def _run_triton(stacks: Sequence[Stack], rule: Rule, kind: ArrayKind, threads: int | None) -> None:
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


_RUNS: Mapping[Backend, Callable[[Sequence[Stack], Rule, ArrayKind, int | None], None]] = MappingProxyType(
    {
        Backend.CPU: _run_native,
        Backend.CUDA: _run_cuda,
        Backend.REFERENCE: _run_reference,
        Backend.TRITON: _run_triton,
    }
)
