"""Runs some golden cases as fibers in a process of their own: under sanitizers, or with a bug planted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from cases import expected, golden_cases, outlier_cases
from device import run_device, seed_of
from fibers import load
from harness import assert_same_bits

from pymerge.backends.cuda import Job, merge_tensors
from pymerge.rule import Scope

MOST_ELEMENTS, SHARE = 1100, 4  # sanitizers are slow: so large at most, and one case in four


def main() -> None:
    """Arguments: the module that was built, and what to do."""
    kernels, task = load(Path(sys.argv[1])), sys.argv[2]
    small = [case for case in golden_cases() + outlier_cases() if 0 < case.size <= MOST_ELEMENTS]
    cases = [dataclasses.replace(case, dtypes="bf16", cast=None, out=None) for case in small[::SHARE]]
    if task == "no barriers":
        kernels.skip_barriers(True)
    if task == "write past the end":
        large = (case for case in cases if case.scope is Scope.TENSOR and case.size > 1000)
        group, merged = expected(next(case for case in large if case.method == "ties"))
        assert group.bases
        rows = [[group.bases[0], *group.experts[0]]]
        Job.count = property(lambda job: job.inputs[0].numel())  # type: ignore[assignment,method-assign]
        outs = [merged[0].new_zeros(merged[0].numel() - 8)]
        merge_tensors(group.names[:1], rows, outs, group.rule, kernels=kernels, stream=0)
        return
    for case in cases:
        group, merged = expected(case)
        assert_same_bits(group, run_device(group, kernels, seed=1 + seed_of(case)), merged)
    print(f"{len(cases)} cases agree")


if __name__ == "__main__":
    main()
