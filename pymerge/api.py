"""Merging checkpoints from Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pymerge.checkpoint.layout import parse_size
from pymerge.dtypes import DType
from pymerge.errors import PymergeError
from pymerge.parameters import merging_dtype
from pymerge.plan_chain import Stage
from pymerge.plan_chain import plan_documents as make_stages
from pymerge.planner import Plan, make_plan
from pymerge.recipe import Document, Draft, Recipe, load_documents, parse_documents, single
from pymerge.run.results import Summary

if TYPE_CHECKING:
    from pymerge.plan_variants import Variant
    from pymerge.run.sweep import Swept
    from pymerge.sweep_settings import Setting, Value

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
    return make_plan(draft, None if out is None else _path(out), **options)


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
    target = None if out is None else _path(out)
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
        recipe, _path(out), intermediate_dir=intermediate_dir, max_shard_size=max_shard_size, dtype=dtype
    )
    memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    settings_of = partial(settings_for, threads=threads, max_memory=memory)
    start = start_for(backend, threads=threads, max_memory=memory)
    stream = sys.stderr if progress else None
    *_, (_, summary) = execute_stages(stages, settings_of, start, stream)
    assert summary is not None, "the output comes last, and it does not exist before"
    return summary


def plan_sweep(
    recipe: Path | str,
    out: Path | str,
    settings: Mapping[str, Iterable[Value]] | Iterable[Setting],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
) -> tuple[Variant, ...]:
    """What `sweep` would do, from headers alone: its outputs, with a plan for each. Arguments as there."""
    from pymerge.plan_variants import plan_variants
    from pymerge.sweep_settings import settings_of

    wanted = settings_of(settings)
    options = _options(max_shard_size, dtype)
    if isinstance(recipe, Recipe):
        raise PymergeError("a sweep takes a recipe's path or text: other parameters make another text")
    return plan_variants(single(_documents(recipe)), wanted, _path(out), **options)


def sweep(
    recipe: Path | str,
    out: Path | str,
    settings: Mapping[str, Iterable[Value]] | Iterable[Setting],
    *,
    threads: int | None = None,
    max_memory: int | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    dtype: DType | str | None = None,
    progress: bool = False,
) -> list[Swept]:
    """Merge `recipe` once for each setting, reading the inputs together, each into a folder of `out`.

    `settings`: values for each parameter, of which every combination is merged, or the combinations
    themselves: {"density": [0.1, 0.2], "lambda": [0.5, 1]} or [{"density": 0.1, "lambda": 1}]. Values are
    numbers, flags or words. A parameter holds for all models, whatever the recipe gives, but "weight@NAME"
    for the model whose path ends in NAME; `seed` is a parameter, too. Every output is what `merge` makes of
    the recipe with these parameters, bit for bit; a folder is named after them, `density0.1-lambda1`. What an
    interrupted sweep has finished is kept. Other arguments as in `merge`. Raises PymergeError.
    """
    from pymerge.run.settings import settings_for
    from pymerge.run.sweep import execute_sweep

    variants = plan_sweep(recipe, out, settings, max_shard_size=max_shard_size, dtype=dtype)
    memory = parse_size(max_memory) if isinstance(max_memory, str) else max_memory
    settings_of = partial(settings_for, threads=threads, max_memory=memory)
    return execute_sweep(variants, settings_of, sys.stderr if progress else None)


class _Options(TypedDict):
    max_shard_bytes: int
    dtype: DType | None


def _options(max_shard_size: int | str, dtype: DType | str | None) -> _Options:
    """As `make_plan` takes them."""
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, (int, str)):
        raise PymergeError(f"max_shard_size is {max_shard_size!r}, expected bytes or text such as '5GB'")
    if dtype is not None and not isinstance(dtype, (str, DType)):
        raise PymergeError(f"dtype is {dtype!r}, expected a name such as 'bfloat16'")
    size = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
    if size < 1:
        raise PymergeError(f"a shard must hold at least one byte, not {size}")
    return {"max_shard_bytes": size, "dtype": merging_dtype(dtype) if isinstance(dtype, str) else dtype}


def _path(out: object) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        raise PymergeError(f"out is a {type(out).__name__}, expected the path of a folder")
    return Path(out)


def _documents(recipe: Path | str) -> tuple[Document, ...]:
    if isinstance(recipe, str) and "\n" in recipe:
        return parse_documents(recipe, Path.cwd())
    if not isinstance(recipe, (str, os.PathLike)):
        kind = type(recipe).__name__
        raise PymergeError(f"the recipe is a {kind}, expected a path, text of several lines or a Recipe")
    return load_documents(Path(recipe))
