"""From what the user may choose, and what the machine has, to who merges and with what settings."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pymerge.backends.native import Isa, NativeRun, Settings
from pymerge.errors import BackendError, PymergeError
from pymerge.plan_memory import budget
from pymerge.planner import Plan
from pymerge.run.local import Start

BACKENDS = ("cpu", "cuda", "triton")
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
    """Settings for one plan; None leaves it to the core. `max_memory` in bytes, `tile` in elements.

    Raises PymergeError for what is no whole number, or too little memory.
    """
    for name, value in (("threads", threads), ("max_memory", max_memory)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise PymergeError(f"{name} is {value!r}, expected a whole number")
    settings = Settings(threads=threads or 0, isa=isa, drop_behind=_is_larger_than_cache(plan))
    if max_memory is not None:
        shares = budget(plan, threads, max_memory)
        settings = replace(settings, tile=shares.tile, memory=shares.lists)
    return settings if tile is None else replace(settings, tile=tile)


def start_for(backend: str, *, threads: int | None = None, max_memory: int | None = None) -> Start:
    """What makes the runs of a backend; BackendError where it is unknown or cannot run here."""
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} does not merge checkpoints; {', '.join(BACKENDS)} do")
    if backend == "cpu":
        return NativeRun
    missing = missing_for(backend)
    if missing is not None:
        raise BackendError(missing)
    from pymerge.run.on_device import start_on  # needs torch

    return start_on(backend, max_memory, threads)


def missing_for(backend: str) -> str | None:
    """What keeps backend "cuda" or "triton" from merging checkpoints here; None: nothing."""
    extra = "triton" if backend == "triton" else "torch"
    if find_spec("torch") is None or find_spec(extra) is None:
        needed = "torch and triton" if backend == "triton" else "torch"
        return f"the {backend} backend needs {needed}; install pymerge-kernels[{extra}]"
    if backend == "cuda":
        from pymerge.backends import cuda

        return cuda.available()
    import torch

    return None if torch.cuda.is_available() else "the triton backend needs a GPU that torch can use"


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
