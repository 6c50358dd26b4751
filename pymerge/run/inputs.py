"""The input files of a run: opened together, and no others than were planned with."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pymerge.backends.native import OpenFile
from pymerge.checkpoint.header import Header
from pymerge.errors import CheckpointError, OutputError
from pymerge.files import open_regular
from pymerge.job import Region, TensorJob, regions_of
from pymerge.planner import Plan
from pymerge.rule import Scope

# The lock of an output's folder.
OWN_FILES = 1


@contextmanager
def opened_inputs(plan: Plan, jobs: Sequence[TensorJob]) -> Iterator[tuple[OpenFile, ...]]:
    """The files that the jobs read, open.

    Raises CheckpointError when one is not the file that was planned with, be it when it is opened or at the
    end.
    """
    needed: set[int] = set()
    for job in jobs:
        for source in job.inputs:
            if isinstance(source, Region):
                needed.add(source.file)
            else:
                needed.update(region.file for region in regions_of(source))
    with ExitStack() as stack:
        files = []
        for number in sorted(needed):
            shard = plan.shards[number]
            fd = _open_input(shard.path, shard.header)
            stack.callback(os.close, fd)
            files.append(OpenFile(number, str(shard.path), fd))
        yield tuple(files)
        for file in files:
            shard = plan.shards[file.number]
            _check_unchanged(file.fd, shard.path, shard.header)


def _open_input(path: Path, header: Header) -> int:
    fd = open_regular(path)
    try:
        _check_unchanged(fd, path, header)
    except CheckpointError:
        os.close(fd)
        raise
    return fd


def _check_unchanged(fd: int, path: Path, header: Header) -> None:
    state, size = os.fstat(fd), header.file_size
    if (state.st_size, state.st_mtime_ns) == (size, header.mtime_ns):
        return
    what = (
        f"it has {state.st_size:,} bytes, expected {size:,}" if state.st_size != size else "its time differs"
    )
    raise CheckpointError(f"{path} was changed after the merge was planned: {what}")


def raise_file_limit() -> int:
    """How many files may be open from now on: many shards are, and the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if allowed == resource.RLIM_INFINITY else allowed


def check_file_limit(plans: Sequence[Plan], allowed: int) -> None:
    """OutputError where more outputs are merged together than files may be open."""
    each = len(plans[0].layouts) if plans[0].scope is Scope.MODEL else 1
    needed = len(plans[0].shards) + len(plans) * (each + OWN_FILES)
    if len(plans) > 1 and needed > allowed:
        raise OutputError(
            f"{len(plans):,} outputs together need {needed:,} open files, this system allows {allowed:,};"
            " raise the limit (ulimit -n), or give fewer settings at a time"
        )
