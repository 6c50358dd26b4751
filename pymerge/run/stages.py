"""The merges of a recipe's documents, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from pymerge.backends.native import NativeRun, Settings
from pymerge.errors import OutputError
from pymerge.plan_chain import Stage
from pymerge.planner import Plan
from pymerge.run.local import Start, execute_plan
from pymerge.run.progress import Bar
from pymerge.run.results import Summary


def execute_stages(
    stages: Sequence[Stage],
    settings_of: Callable[[Plan], Settings],
    start: Start = NativeRun,
    stream: TextIO | None = None,
) -> Iterator[tuple[Stage, Summary | None]]:
    """Merge what is not done yet; gives each stage with its summary, None where it was done before.

    `stream`: a terminal for a bar. Raises PymergeError, where settings are wrong before the first merge.
    """
    for stage in stages:
        settings_of(stage.planned)
    for stage in stages:
        if stage.out is None:
            raise OutputError("the stages were planned without an output")
        if stage.done:
            yield stage, None
            continue
        plan = stage.ready()
        with Bar(stream) as bar:
            summary = execute_plan(plan, stage.out, settings_of(plan), bar, start)
        yield stage, summary
