"""Merging tensors in memory: torch tensors on the CPU or numpy arrays, single or in dicts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pymerge.backends.arrays import Array, ArrayKind, kind_of
from pymerge.dtypes import DType, promote
from pymerge.errors import BackendError, RecipeError
from pymerge.job import Region, TensorJob
from pymerge.methods import method_named, rule_for
from pymerge.rule import Rule, Scope, ThresholdTies

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


# The undecided positions of tensors in memory may take this part of the inputs' size (they need half of it).
LIST_SHARE = 8


class Backend(Enum):
    """Who computes: the compiled CPU core, or the torch reference that defines the result."""

    CPU = "cpu"
    REFERENCE = "reference"


def merge_tensors(
    base: Tensors | None,
    experts: Sequence[Tensors],
    *,
    method: str = "ties",
    weight: float | Sequence[float] | None = 1.0,
    density: float | Sequence[float] | None = 1.0,
    lambda_: float = 1.0,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: str = "first",
    scope: str = "tensor",
    seed: int = 0,
    out: Tensors | None = None,
    out_dtype: object = None,
    threads: int | None = None,
    backend: str | None = None,
) -> Tensors:
    """Merge `experts` (all of the base's shape, any mix of f16, bf16, f32, f64) and return the same kind.

    `base`, `experts`: tensors, or dicts of tensors with the same names; never modified. `base` is None for
    `linear`. `weight`, `density`: a number for all experts or one for each; None: the method's default.
    `threshold_ties`: "first" keeps exactly int(density * n) entries, the lowest flat index first among
    equals, "all" keeps every |d| >= threshold. `scope`: "tensor", or "model" for one threshold over a whole
    dict. `out`: where to write, contiguous and apart from the inputs. `out_dtype`: element type of the result
    (default: the inputs' common type). `threads`: None uses every core. `backend`: "cpu",
    "reference" or None.
    Raises RecipeError for wrong options, BackendError for inputs that no backend takes.
    """
    if threads is not None and threads < 1:
        raise RecipeError(f"threads is {threads}, expected at least 1, or None for every core")
    rule: Rule = rule_for(
        method_named(method),
        weights=_per_expert(weight, len(experts), 1.0, "weight"),
        densities=None if density is None else _per_expert(density, len(experts), 1.0, "density"),
        lambda_=lambda_,
        normalize=normalize,
        rescale=rescale,
        threshold_ties=_choice(ThresholdTies, threshold_ties, "threshold_ties"),
        scope=_choice(Scope, scope, "scope"),
        seed=seed,
    )
    if rule.task_vector and base is None:
        raise RecipeError(f"{method} works on task vectors, so it needs a base")
    sources = [*([base] if rule.task_vector and base is not None else []), *experts]
    if not isinstance(sources[0], Mapping):
        named = [{"": source} for source in sources]
        single = None if out is None else {"": out}
        merged = _merge_named(named, rule, single, out_dtype, threads, backend)
        return cast("Tensors", merged[""])
    return cast("Tensors", _merge_named(sources, rule, out, out_dtype, threads, backend))


E_ = TypeVar("E_", bound=Enum)


def _choice(kind: type[E_], text: str, name: str) -> E_:
    try:
        return kind(text)
    except ValueError:
        known = " or ".join(str(member.value) for member in kind)
        raise RecipeError(f"{name} is {text!r}, expected {known}") from None


def _per_expert(
    value: float | Sequence[float] | None, count: int, default: float, name: str
) -> tuple[float, ...]:
    if value is None:
        return (default,) * count
    if isinstance(value, (int, float)):
        return (float(value),) * count
    values = tuple(float(v) for v in value)
    if len(values) != count:
        raise RecipeError(f"{len(values)} values of {name} for {count} experts")
    return values


def _merge_named(
    sources: Sequence[Any], rule: Rule, out: Any, out_dtype: object, threads: int | None, backend: str | None
) -> dict[str, Array]:
    for number, source in enumerate(sources):
        if not isinstance(source, Mapping):
            raise BackendError(f"input {number} is a {type(source).__name__}, but the first input is a dict")
        if source.keys() != sources[0].keys():
            odd = sorted(set(source) ^ set(sources[0]))
            raise BackendError(
                f"input {number} does not have the first input's names; they differ in {odd[:3]}"
            )
    inputs = {name: [source[name] for source in sources] for name in sources[0]}
    if not inputs:
        return {}
    kind = kind_of(next(iter(inputs.values()))[0])
    wanted = None if out_dtype is None else kind.parse_dtype(out_dtype)
    checked = {name: _check(name, arrays, kind, backend) for name, arrays in inputs.items()}
    results = {
        name: _result(name, arrays, kind, wanted, None if out is None else out[name])
        for name, arrays in checked.items()
    }
    if out is not None:
        _check_apart(inputs, out, kind)
    chosen = _choice(Backend, backend or Backend.CPU.value, "backend")
    if chosen is Backend.REFERENCE:
        _run_reference(checked, results, rule, kind)
    else:
        _run_native(checked, results, rule, kind, threads)
    return results


def _check(name: str, arrays: list[Any], kind: ArrayKind, backend: str | None) -> list[Array]:
    label = f"tensor {name!r}: " if name else ""
    for number, array in enumerate(arrays):
        if kind_of(array) is not kind:
            raise BackendError(
                f"{label}input {number} is a {type(array).__name__}, but the first input is not"
            )
        if kind.shape(array) != kind.shape(arrays[0]):
            raise BackendError(
                f"{label}input {number} has shape {kind.shape(array)}, expected {kind.shape(arrays[0])}"
            )
        if backend != Backend.REFERENCE.value:
            kind.check_place(array, f"{label}input {number}")
    dtypes = {kind.dtype(array) for array in arrays}
    if not all(dtype.mergeable for dtype in dtypes) and (len(dtypes) > 1 or not next(iter(dtypes)).copyable):
        names = ", ".join(sorted(dtype.torch_name for dtype in dtypes))
        raise BackendError(f"{label}element types {names} cannot be merged")
    return [kind.contiguous(array) for array in arrays]


def _result(name: str, arrays: list[Array], kind: ArrayKind, wanted: DType | None, out: Any) -> Array:
    stored = {kind.dtype(array) for array in arrays}
    dtype = promote(stored) if all(d.mergeable for d in stored) else next(iter(stored))
    if wanted is not None and dtype.mergeable:
        if not wanted.mergeable:
            raise BackendError(
                f"out_dtype is {wanted.torch_name}, expected a float type of 16, 32 or 64 bits"
            )
        dtype = wanted
    if out is None:
        return kind.empty(arrays[0], dtype)
    label = f"tensor {name!r}: " if name else ""
    if kind_of(out) is not kind or kind.shape(out) != kind.shape(arrays[0]) or kind.dtype(out) is not dtype:
        raise BackendError(
            f"{label}out must have shape {kind.shape(arrays[0])} and element type {dtype.torch_name}"
        )
    if not kind.is_contiguous(out):
        raise BackendError(f"{label}out must be contiguous")
    kind.check_place(out, f"{label}out")
    return cast("Array", out)


def _check_apart(inputs: Mapping[str, Sequence[Any]], outs: Mapping[str, Any], kind: ArrayKind) -> None:
    """Results are written while inputs are read, so `out` must not touch any input, nor itself twice."""
    read = [kind.bounds(array) for arrays in inputs.values() for array in arrays]
    written: list[tuple[int, int]] = []
    for name in inputs:
        start, end = kind.bounds(outs[name])
        label = f"tensor {name!r}: " if name else ""
        for others, what in (
            (read, "an input, which would be overwritten while it is read"),
            (written, "another out"),
        ):
            if start < end and any(low < end and start < high for low, high in others):
                raise BackendError(f"{label}out shares memory with {what}")
        written.append((start, end))


def _run_native(
    inputs: dict[str, list[Array]],
    results: dict[str, Array],
    rule: Rule,
    kind: ArrayKind,
    threads: int | None,
) -> None:
    from pymerge.backends.native import NativeRun, Settings

    def region(array: Array) -> Region:
        return Region(kind.dtype(array), kind.span(array)[0])

    jobs = []
    for name, arrays in inputs.items():
        regions = [region(array) for array in arrays]
        mergeable = kind.dtype(arrays[0]).mergeable
        has_base = rule.task_vector and mergeable
        jobs.append(
            TensorJob(
                name=name,
                count=kind.count(arrays[0]),
                base=regions[0] if has_base else None,
                experts=tuple(regions[1:] if has_base else regions),
                out=region(results[name]),
                rule=rule if mergeable else None,
            )
        )
    size = sum(kind.span(array)[1] - kind.span(array)[0] for arrays in inputs.values() for array in arrays)
    settings = Settings(threads=threads or 0, memory=max(Settings.memory, size // LIST_SHARE))
    NativeRun(jobs, rule.scope, [], settings).execute()


def _run_reference(
    inputs: dict[str, list[Array]], results: dict[str, Array], rule: Rule, kind: ArrayKind
) -> None:
    if "torch" not in sys.modules:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise BackendError("the reference backend needs torch; install pymerge-kernels[torch]") from None
    from pymerge.backends.reference import merge_group

    floats = [name for name, arrays in inputs.items() if kind.dtype(arrays[0]).mergeable]
    tensors = {name: [kind.as_torch(array) for array in inputs[name]] for name in floats}
    first = 1 if rule.task_vector else 0
    merged = merge_group(
        floats,
        [tensors[name][0] for name in floats] if rule.task_vector else None,
        [tensors[name][first:] for name in floats],
        rule,
        [kind.as_torch(results[name]).dtype for name in floats],
    )
    for name, tensor in zip(floats, merged, strict=True):
        kind.as_torch(results[name]).copy_(tensor)
    for name in inputs.keys() - set(floats):
        values = [kind.as_torch(array) for array in inputs[name]]
        if any(not bool((value == values[0]).all()) for value in values):
            raise BackendError(f"tensor {name!r}: tensors of integers must be equal in all inputs")
        kind.as_torch(results[name]).copy_(values[0])
