"""From what the user may choose, and what the machine has, to the compiled core's settings."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pymerge.backends.native import Isa, Settings
from pymerge.plan_memory import budget
from pymerge.planner import Plan

# The limits of a container, under the second and the first version of control groups.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def settings_for(
    plan: Plan,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    tile: int | None = None,
    isa: Isa = Isa.AUTO,
) -> Settings:
    """Settings for one plan; None leaves it to the core. `max_memory` in bytes, `tile` in elements."""
    settings = Settings(threads=threads or 0, isa=isa, drop_behind=_is_larger_than_cache(plan))
    if max_memory is not None:
        shares = budget(plan, threads, max_memory)
        settings = replace(settings, tile=shares.tile, memory=shares.lists)
    return settings if tile is None else replace(settings, tile=tile)


def _is_larger_than_cache(plan: Plan) -> bool:
    """Whether keeping the inputs in the page cache would push out what others use."""
    available = available_memory()
    return available is not None and plan.bytes_read // plan.passes > available // 2


def available_memory() -> int | None:
    """Bytes that can be used without swapping, within the container's limit; None where that is unknown."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit in CGROUP_LIMITS:
        with suppress(OSError, ValueError):
            found.append(int(limit.read_text()))
    return min(found, default=None)
