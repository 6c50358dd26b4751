"""Runs groups of torch tensors through the Triton kernels: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cases import METHODS, Case, Group, expected
from harness import assert_same_bits, place
from torch import Tensor

from pymerge.backends import triton as backend
from pymerge.rule import Scope, ThresholdTies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
WIDE = backend.Settings(block=1 << 15)
# Several whole pieces and a ragged one, streamed although small.
STREAM = backend.Settings(block=1 << 13, one_pass_from=8192)
LENGTH = 20_001


def run_triton(
    group: Group, settings: backend.Settings = WIDE, offset: int = 0
) -> tuple[list[Tensor], backend.Report]:
    """Merges a group on the device; every tensor lies `offset` bytes off alignment, and none is modified."""
    assert group.cast is None
    held: list[Tensor] = []

    def on_device(x: Tensor) -> Tensor:
        held.append(place(x, offset).to(DEVICE))
        return held[-1][offset : offset + x.numel() * x.dtype.itemsize].view(x.dtype)

    bases = None if group.bases is None else [on_device(x) for x in group.bases]
    experts = [[on_device(x) for x in xs] for xs in group.experts]
    before = [x.clone() for x in held]
    inputs = len(held)
    outs = [
        on_device(torch.zeros(xs[0].numel(), dtype=dtype))
        for xs, dtype in zip(group.experts, group.out_dtypes, strict=True)
    ]
    report = backend.merge_group(group.names, bases, experts, outs, group.rule, settings)
    assert all(torch.equal(x, y) for x, y in zip(held[:inputs], before, strict=True)), "an input changed"
    for room, out in zip(held[inputs:], outs, strict=True):
        end = offset + out.numel() * out.dtype.itemsize
        assert (room[:offset] == 0xA5).all(), "written before a start"
        assert (room[end:] == 0xA5).all(), "written past an end"
    return [out.cpu() for out in outs], report


def check(case: Case, settings: backend.Settings = WIDE, offset: int = 0) -> backend.Report:
    group, merged = expected(case)
    actual, report = run_triton(group, settings, offset)
    assert_same_bits(group, actual, merged)
    return report


def simple(method: str, size: int, k: int, **changes: Any) -> Case:
    """A case of one tensor, in bf16, with mixed weights."""
    case = Case(
        method=method,
        size=size,
        k=k,
        dtypes="bf16",
        data="realistic",
        density=0.3,
        weights="mixed",
        lambda_=0.7,
        scope=Scope.TENSOR,
        ties=ThresholdTies.FIRST,
        normalize=METHODS[method][3],
        rescale=False,
        cast=None,
        out=None,
        seed=3,
    )
    return dataclasses.replace(case, **changes)
