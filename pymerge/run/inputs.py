"""The input files of a run: opened together, and no others than were planned with."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pymerge.backends.native import OpenFile
from pymerge.checkpoint.header import Header
from pymerge.errors import CheckpointError
from pymerge.files import open_regular
from pymerge.job import TensorJob, regions_of
from pymerge.planner import Plan


@contextmanager
def opened_inputs(plan: Plan, jobs: Sequence[TensorJob]) -> Iterator[tuple[OpenFile, ...]]:
    """The files that the jobs read, open.

    Raises CheckpointError when one is not the file that was planned with, be it when it is opened or at the
    end.
    """
    sources = (source for job in jobs for source in job.inputs)
    needed = {region.file for source in sources for region in regions_of(source)}
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


def raise_file_limit() -> None:
    """Many experts of many shards are open together; the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
