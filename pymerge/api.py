"""Merging checkpoints from Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pymerge.checkpoint.layout import parse_size
from pymerge.dtypes import DType
from pymerge.errors import PymergeError
from pymerge.parameters import merging_dtype
from pymerge.planner import Plan, make_plan
from pymerge.recipe import Draft, Recipe, load_draft, parse_draft
from pymerge.run.results import Summary

DEFAULT_SHARD_SIZE = "5GB"


def plan(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
) -> Plan:
    """What merging `recipe` would do, from headers alone.

    `recipe`: a file's path, recipe YAML (text of several lines) or a Recipe. `out`: checked too when given.
    `max_shard_size`: bytes, or text such as "5GB". `dtype`: element type of the output, before the recipe's.
    Raises PymergeError; a ProblemList holds every problem that recipe and headers show.
    """
    size = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
    if size < 1:
        raise PymergeError(f"a shard must hold at least one byte, not {size}")
    folder = None if out is None else Path(out)
    wanted = merging_dtype(dtype) if isinstance(dtype, str) else dtype
    return make_plan(_draft(recipe), folder, max_shard_bytes=size, dtype=wanted)


def merge(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    threads: int | None = None,
    max_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
    progress: bool = False,
    backend: str = "cpu",
) -> Summary:
    """Merge `recipe` into the new folder `out`, which appears complete or not at all.

    Arguments as in `plan`; `threads`: None uses every processor; `max_memory`: bytes (or text) for
    buffers, None: 64 MiB and the tiles; `progress`: a bar on stderr when that is a terminal;
    `backend`: "cpu", or "cuda" or "triton" for a GPU, with the same bits. Raises PymergeError.
    """
    from pymerge.run.local import execute_plan
    from pymerge.run.progress import Bar
    from pymerge.run.settings import settings_for, start_for

    planned = plan(recipe, out, max_shard_size=max_shard_size, dtype=dtype)
    memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    settings = settings_for(planned, threads=threads, max_memory=memory)
    start = start_for(backend, threads=threads, max_memory=memory)
    if not progress:
        return execute_plan(planned, Path(out), settings, start=start)
    with Bar(sys.stderr) as bar:
        return execute_plan(planned, Path(out), settings, bar, start)


def _draft(recipe: Recipe | Path | str) -> Draft:
    if isinstance(recipe, Recipe):
        return Draft(recipe)
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_draft(recipe, Path.cwd())
    if not isinstance(recipe, (str, os.PathLike)):
        kind = type(recipe).__name__
        raise PymergeError(f"the recipe is a {kind}, expected a path, text of several lines or a Recipe")
    return load_draft(Path(recipe))
