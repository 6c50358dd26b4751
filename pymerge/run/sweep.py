"""A sweep: many outputs of the same inputs, which are read together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from pymerge.backends.native import Settings
from pymerge.errors import OutputError
from pymerge.plan_variants import Variant
from pymerge.planner import Plan
from pymerge.run.local import execute_plans
from pymerge.run.progress import Bar
from pymerge.run.results import Summary
from pymerge.sweep_settings import Setting


class Swept(NamedTuple):
    """One output of a sweep; `summary`: None where it was merged before, and kept."""

    setting: Setting
    out: Path
    summary: Summary | None


def execute_sweep(
    variants: Sequence[Variant], settings_of: Callable[[Plan], Settings], stream: TextIO | None = None
) -> list[Swept]:
    """Merge what is not done yet; `stream`: a terminal for a bar. Raises PymergeError."""
    outs = [variant.out for variant in variants if variant.out is not None]
    if len(outs) < len(variants):
        raise OutputError("the sweep was planned without an output")
    waiting = [(variant.plan, out) for variant, out in zip(variants, outs, strict=True) if not variant.done]
    summaries: list[Summary] = []
    if waiting:
        plans = [plan for plan, _ in waiting]
        with Bar(stream) as bar:
            summaries = execute_plans(plans, [out for _, out in waiting], settings_of(plans[0]), bar)
    left = iter(summaries)
    return [
        Swept(variant.setting, out, None if variant.done else next(left))
        for variant, out in zip(variants, outs, strict=True)
    ]
