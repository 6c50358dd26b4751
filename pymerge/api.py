"""Merging checkpoints from Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TypedDict

from pymerge.backends.native import Settings
from pymerge.checkpoint.layout import parse_size
from pymerge.dtypes import DType
from pymerge.errors import PymergeError
from pymerge.parameters import merging_dtype
from pymerge.plan_chain import Stage
from pymerge.plan_chain import plan_documents as make_stages
from pymerge.planner import Plan, make_plan
from pymerge.recipe import Document, Draft, Recipe, load_documents, parse_documents, single
from pymerge.run.results import Summary

DEFAULT_SHARD_SIZE = "5GB"
PARTS = ".parts"  # what the folder of intermediate merges is called after the output


def plan(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
) -> Plan:
    """What merging `recipe` would do, from headers alone.

    `recipe`: a file's path, recipe YAML (text of several lines) or a Recipe; one document. `out`: checked too
    when given. `max_shard_size`: bytes, or text such as "5GB". `dtype`: element type of the output, before
    the recipe's. Raises PymergeError; a ProblemList holds every problem that recipe and headers show.
    """
    options = _options(max_shard_size, dtype)
    draft = Draft(recipe) if isinstance(recipe, Recipe) else single(_documents(recipe)).draft()
    return make_plan(draft, None if out is None else Path(out), **options)


def plan_documents(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    *,
    intermediate_dir: Path | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
) -> tuple[Stage, ...]:
    """What merging each document of `recipe` would do, in the order in which they are merged.

    Arguments as in `plan` and `merge`. Raises PymergeError; a ProblemList holds the problems of all of them.
    """
    options = _options(max_shard_size, dtype)
    target = None if out is None else Path(out)
    if isinstance(recipe, Recipe):
        return (Stage.alone(make_plan(recipe, target, **options)),)
    folder = Path(f"{out or 'OUT'}{PARTS}") if intermediate_dir is None else Path(intermediate_dir)
    return make_stages(_documents(recipe), target, folder, **options)


def merge(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    intermediate_dir: Path | str | None = None,
    threads: int | None = None,
    max_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
    progress: bool = False,
    backend: str = "cpu",
) -> Summary:
    """Merge `recipe` into the new folder `out`, which appears complete or not at all.

    Arguments as in `plan`; `intermediate_dir`: where documents of the recipe that have names are merged
    (None: the folder `out`.parts); what is finished there is kept. `threads`: None uses every processor;
    `max_memory`: bytes (or text) for buffers, None: 64 MiB and the tiles; `progress`: a bar on stderr when
    that is a terminal; `backend`: "cpu", or "cuda" or "triton" for a GPU, with the same bits. Returns the
    summary of the merge into `out`. Raises PymergeError.
    """
    from pymerge.run.settings import settings_for, start_for
    from pymerge.run.stages import execute_stages

    stages = plan_documents(
        recipe, out, intermediate_dir=intermediate_dir, max_shard_size=max_shard_size, dtype=dtype
    )
    memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory

    def settings_of(planned: Plan) -> Settings:
        return settings_for(planned, threads=threads, max_memory=memory)

    start = start_for(backend, threads=threads, max_memory=memory)
    stream = sys.stderr if progress else None
    *_, (_, summary) = execute_stages(stages, settings_of, start, stream)
    assert summary is not None, "the output comes last, and it does not exist before"
    return summary


class _Options(TypedDict):
    max_shard_bytes: int
    dtype: DType | None


def _options(max_shard_size: int | str, dtype: DType | str | None) -> _Options:
    """As `make_plan` takes them."""
    size = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
    if size < 1:
        raise PymergeError(f"a shard must hold at least one byte, not {size}")
    return {"max_shard_bytes": size, "dtype": merging_dtype(dtype) if isinstance(dtype, str) else dtype}


def _documents(recipe: Path | str) -> tuple[Document, ...]:
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_documents(recipe, Path.cwd())
    if not isinstance(recipe, (str, os.PathLike)):
        kind = type(recipe).__name__
        raise PymergeError(f"the recipe is a {kind}, expected a path, text of several lines or a Recipe")
    return load_documents(Path(recipe))
