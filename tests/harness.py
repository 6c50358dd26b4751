"""Runs groups of torch tensors through the compiled core, and compares bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import Group, bits
from torch import Tensor

from pymerge.backends.native import Isa, NativeRun, Report, Settings, Threshold, available_isas
from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.job import Region, TensorJob, row_of

ISAS = [isa for isa in available_isas() if isa is not Isa.AUTO]


def dtype_of(dtype: torch.dtype) -> DType:
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def place(x: Tensor, offset: int) -> Tensor:
    """The bytes of `x` in a buffer of their own, `offset` bytes past its (aligned) start."""
    size = x.numel() * x.dtype.itemsize
    room = torch.full((size + 64,), 0xA5, dtype=torch.uint8)
    room[offset : offset + size] = x.contiguous().reshape(-1).view(torch.uint8)
    return room


def run_native(
    group: Group, settings: Settings, offset: int = 0, thresholds: Sequence[Sequence[Threshold]] = ()
) -> tuple[list[Tensor], Report]:
    """Merges a group in memory, every buffer `offset` bytes off alignment; returns results and report.

    Checks that no input changed, and that nothing was written around a result.
    """
    held, jobs, outs = [], [], []

    def region(x: Tensor) -> Region:
        held.append(place(x, offset))
        return Region(dtype_of(x.dtype), held[-1].data_ptr() + offset)

    for i, (name, xs, out_dtype) in enumerate(zip(group.names, group.experts, group.out_dtypes, strict=True)):
        outs.append(place(torch.zeros(xs[0].numel(), dtype=out_dtype), offset))
        jobs.append(
            TensorJob(
                name=name,
                count=xs[0].numel(),
                base=None if group.bases is None else region(group.bases[i]),
                experts=tuple(region(x) for x in xs),
                out=Region(dtype_of(out_dtype), outs[-1].data_ptr() + offset),
                rule=group.rule,
                cast=None if group.cast is None else dtype_of(group.cast),
                row=row_of(xs[0].shape, group.rule),
            )
        )
    before = [x.clone() for x in held]
    report = NativeRun(jobs, group.rule.scope, [], settings, thresholds).execute()
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True)), "an input was modified"
    merged = []
    for out, job, out_dtype in zip(outs, jobs, group.out_dtypes, strict=True):
        end = offset + job.count * out_dtype.itemsize
        assert (out[:offset] == 0xA5).all(), f"{job.name} was written before its start"
        assert (out[end:] == 0xA5).all(), f"{job.name} was written past its end"
        merged.append(out[offset:end].clone().view(out_dtype))
    return merged, report


def assert_same_bits(group: Group, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Fails with the first differing element, its inputs and both results."""
    for i, (name, a, e) in enumerate(zip(group.names, actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert a.numel() == e.numel(), f"{name}: {a.numel()} elements, expected {e.numel()}"
        wrong = (bits(a.reshape(-1)) != bits(e.reshape(-1))).nonzero().flatten()
        if wrong.numel():
            at = int(wrong[0])
            base = None if group.bases is None else group.bases[i].flatten()[at].item()
            raise AssertionError(
                f"{name}: {wrong.numel()} of {a.numel()} elements differ, first at {at}: "
                f"got {a.flatten()[at].item()!r}, expected {e.flatten()[at].item()!r}; base {base!r}, "
                f"experts {[x.flatten()[at].item() for x in group.experts[i][:9]]}"
            )
