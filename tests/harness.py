"""Runs groups of torch tensors through the compiled core, and compares bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import Group, bits
from torch import Tensor

from pymerge.backends.native import Isa, NativeRun, Report, Settings, Threshold, available_isas
from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.job import Region, TensorJob, row_of
from pymerge.rule import Rule

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
    (merged,), report = run_variants(group, [group.rule], settings, offset, thresholds)
    return merged, report


def run_variants(
    group: Group,
    rules: Sequence[Rule],
    settings: Settings,
    offset: int = 0,
    thresholds: Sequence[Sequence[Threshold]] = (),
) -> tuple[list[list[Tensor]], Report]:
    """The same by several rules in one run."""
    held: list[Tensor] = []

    def region(x: Tensor) -> Region:
        held.append(place(x, offset))
        return Region(dtype_of(x.dtype), held[-1].data_ptr() + offset)

    bases = None if group.bases is None else [region(base) for base in group.bases]
    experts = [tuple(region(x) for x in xs) for xs in group.experts]
    outs = [
        [
            place(torch.zeros(xs[0].numel(), dtype=dtype), offset)
            for xs, dtype in zip(group.experts, group.out_dtypes, strict=True)
        ]
        for _ in rules
    ]
    first, *others = (
        [
            TensorJob(
                name=name,
                count=group.experts[i][0].numel(),
                base=None if bases is None else bases[i],
                experts=experts[i],
                out=Region(dtype_of(group.out_dtypes[i]), row[i].data_ptr() + offset),
                rule=rule,
                cast=None if group.cast is None else dtype_of(group.cast),
                row=row_of(group.experts[i][0].shape, rule),
            )
            for i, name in enumerate(group.names)
        ]
        for rule, row in zip(rules, outs, strict=True)
    )
    before = [x.clone() for x in held]
    report = NativeRun(first, rules[0].scope, [], settings, thresholds, others).execute()
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True)), "an input was modified"
    merged: list[list[Tensor]] = []
    for row in outs:
        merged.append([])
        for out, job, out_dtype in zip(row, first, group.out_dtypes, strict=True):
            end = offset + job.count * out_dtype.itemsize
            assert (out[:offset] == 0xA5).all(), f"{job.name} was written before its start"
            assert (out[end:] == 0xA5).all(), f"{job.name} was written past its end"
            merged[-1].append(out[offset:end].clone().view(out_dtype))
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
