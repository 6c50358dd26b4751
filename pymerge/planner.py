"""From a recipe to jobs: reads headers only, and reports every problem they can show together.

The plan is complete: output files, their headers and offsets, and for each output tensor where its
inputs lie. Nothing is decided later than here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from pymerge.blending import stated
from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.index import Shard, open_checkpoint
from pymerge.checkpoint.layout import OutputTensor, ShardLayout, lay_out
from pymerge.checkpoint.sidefiles import collect
from pymerge.dtypes import DType, promote
from pymerge.errors import ProblemList, PymergeError
from pymerge.explaining import numbers_of
from pymerge.job import Region, TensorJob, row_of
from pymerge.methods import Method, method_named
from pymerge.plan_checks import (
    Input,
    check_configs,
    check_output,
    check_tensors,
    check_working_types,
    free_bytes,
)
from pymerge.plan_rule import donor_path, experts_of, is_same, rule_of
from pymerge.plan_side import side_files
from pymerge.recipe import Draft, Recipe
from pymerge.rule import Rule, Scope, Trim
from pymerge.text import printable
from pymerge.version import NUMERICS_VERSION, VERSION

T = TypeVar("T")

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Plan:
    """Everything about one merge that headers can tell.

    `inputs`: the base first (where the method has one), then the experts in recipe order.
    `shards`: all input files by number; output file i has the number `len(shards) + i` in the jobs' regions.
    `side_files`: what lies beside the weights (configuration and tokenizer of the base, recipe, index).
    `notes`: what the recipe gives and the method does not use, one sentence each.
    """

    recipe: Recipe
    method: Method
    rule: Rule
    out: Path | None
    out_dtype: DType | None
    inputs: tuple[Input, ...]
    side_files: Mapping[str, bytes]
    shards: tuple[Shard, ...]
    layouts: tuple[ShardLayout, ...]
    jobs: tuple[tuple[TensorJob, ...], ...]
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...]

    @property
    def scope(self) -> Scope:
        """What the thresholds are taken over."""
        return self.rule.scope

    @property
    def passes(self) -> int:
        """How often the inputs are read; small tensors perhaps less often."""
        return max((job.reads for shard in self.jobs for job in shard), default=1)

    @property
    def experts(self) -> int:
        """How many models are merged, the base of a task-vector method not counted."""
        return len(self.rule.weights)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk: the weights and what lies beside them, a few kilobytes apart."""
        return self.bytes_written + sum(map(len, self.side_files.values()))

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return sum(len(shard) for shard in self.jobs)

    @property
    def elements(self) -> int:
        """Number of output elements."""
        return sum(job.count for shard in self.jobs for job in shard)

    def digest(self) -> dict[str, object]:
        """What a resumed run must have in common with the run before; JSON-ready. Not the threads."""
        return {
            "pymerge": VERSION,
            "numerics": NUMERICS_VERSION,
            "recipe": self.recipe.text,
            "out_dtype": self.out_dtype.torch_name if self.out_dtype else None,
            "inputs": {
                str(shard.path): [shard.header.digest, shard.header.file_size, shard.header.mtime_ns]
                for shard in self.shards
            },
            "outputs": {layout.file_name: layout.size for layout in self.layouts},
        }

    def describe(self) -> str:
        """The plan in words, one fact a line."""
        trims = self.method.trim is not Trim.NONE
        numbers = numbers_of(self.method, self.rule)
        lines = [f"method       {self.method.name}{', ' if numbers else ''}{numbers}{stated(self.rule)}"]
        weights = iter(zip(self.rule.weights, self.rule.densities, strict=True))
        for source in self.inputs:
            path = printable(str(source.checkpoint.path))
            if source.is_base:
                lines.append(f"base         {path}")
                continue
            weight, density = next(weights)
            given = f" (weight {weight:g}, density {density:g})" if trims else f" (weight {weight:g})"
            lines.append(f"expert       {path}{given if self.method.weighted else ''}")
        lines += [
            f"tensors      {self.tensors:,}, elements {self.elements:,}",
            f"read         {self.bytes_read:,} bytes, passes over the inputs: {self.passes}",
            f"write        {self.bytes_written:,} bytes, files: {len(self.layouts)}{self._type_written()}",
        ]
        if self.out is not None:
            lines.append(f"disk space   {self.disk_bytes:,} bytes needed, {free_bytes(self.out):,} free")
        return "\n".join(lines)

    def _type_written(self) -> str:
        return f", {self.out_dtype.torch_name}" if self.out_dtype else ""

    def summary(self) -> dict[str, object]:
        """The plan in numbers (bytes, counts), JSON-ready."""
        return {
            "method": self.method.name,
            "scope": self.scope.value,
            "base": next((str(source.checkpoint.path) for source in self.inputs if source.is_base), None),
            "experts": [str(source.checkpoint.path) for source in self.inputs if not source.is_base],
            "tensors": self.tensors,
            "elements": self.elements,
            "shards": len(self.layouts),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "passes": self.passes,
            "disk_space_needed": self.disk_bytes,
            "disk_space_free": free_bytes(self.out) if self.out else None,
            "out": str(self.out) if self.out else None,
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe | Draft,
    out: Path | None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: DType | None = None,
) -> Plan:
    """Plan the merge of `recipe` into the folder `out` (None: nothing about the output is checked).

    `dtype`: the output's element type, before the recipe's own. Raises ProblemList with every problem found,
    those of a draft among them.
    """
    draft = recipe if isinstance(recipe, Draft) else Draft(recipe)
    problems = list(draft.problems)
    if draft.recipe is None:
        raise ProblemList(problems)
    found = _examine(draft.recipe, draft.missing, out, problems)
    if problems or found is None:
        raise ProblemList(list(dict.fromkeys(problems)))
    plan = _laid_out(draft.recipe, found, out, max_shard_bytes, dtype)
    if out is not None and plan.disk_bytes > (free := free_bytes(out)):
        raise ProblemList([f"{out} needs {plan.disk_bytes:,} bytes of disk space, {free:,} are free"])
    return plan


class _Found(NamedTuple):
    """What a sound recipe names, and what lies there."""

    method: Method
    rule: Rule
    inputs: list[Input]
    names: list[str]
    side_files: dict[str, bytes]
    notes: list[str]


def _examine(
    recipe: Recipe, missing: Collection[Path], out: Path | None, problems: list[str]
) -> _Found | None:
    """Everything that recipe, headers and side files show; problems are added to the list."""
    notes: list[str] = []
    # A draft without a method says so itself.
    method = _collect(problems, lambda: method_named(recipe.method)) if recipe.method else None
    rule = rule_of(recipe, method, problems, notes) if method else None
    inputs = _open_inputs(recipe, method, rule, missing, problems)
    check_configs(inputs, problems)
    names = check_tensors(inputs, problems)
    if rule and rule.scope is Scope.MODEL:
        check_working_types(inputs, recipe.dtype, problems)
    donor = donor_path(recipe)
    side_files = {} if donor in missing else _collect(problems, lambda: collect(donor))
    if out is not None:
        paths = [recipe.base] if recipe.base else []
        paths += [entry.path for entry in recipe.models]
        check_output(out, [path for path in paths if path not in missing], problems)
    if method is None or rule is None or side_files is None:
        return None
    return _Found(method, rule, inputs, names, side_files, notes)


def _laid_out(
    recipe: Recipe, found: _Found, out: Path | None, max_shard_bytes: int, dtype: DType | None
) -> Plan:
    inputs, rule = found.inputs, found.rule
    out_dtype = dtype or recipe.out_dtype or recipe.dtype
    layouts = lay_out(_outputs(inputs, found.names, out_dtype), max_shard_bytes)
    shards = tuple(shard for source in inputs for shard in source.checkpoint.shards)
    jobs = _jobs(inputs, layouts, len(shards), rule, recipe.dtype)
    donor = donor_path(recipe)
    return Plan(
        recipe=recipe,
        method=found.method,
        rule=rule,
        out=out,
        out_dtype=out_dtype,
        inputs=tuple(inputs),
        shards=shards,
        side_files=side_files(donor, found.side_files, recipe.text, layouts, jobs),
        layouts=layouts,
        jobs=jobs,
        bytes_read=sum(map(bytes_read_by, jobs)),
        bytes_written=sum(layout.size for layout in layouts),
        notes=tuple(found.notes),
    )


def _collect(problems: list[str], action: Callable[[], T]) -> T | None:
    """What `action` gives; its error is added to the problems."""
    try:
        return action()
    except ProblemList as error:
        problems.extend(error.problems)
    except PymergeError as error:
        problems.append(str(error))
    return None


def _open_inputs(
    recipe: Recipe,
    method: Method | None,
    rule: Rule | None,
    missing: Collection[Path],
    problems: list[str],
) -> list[Input]:
    """The readable inputs: base first where the experts are relative to one, then the experts."""
    experts = experts_of(recipe, method) if method else recipe.models
    paths = [(entry.path, False) for entry in experts]
    # Where there is no rule the base is opened all the same, to see what is wrong with it.
    if recipe.base is not None and (rule is None or rule.task_vector):
        base = recipe.base
        paths = [(base, True)] + [(path, False) for path, _ in paths if not is_same(path, base)]
    inputs: list[Input] = []
    first = 0
    for path, is_base in paths:
        if path in missing:
            continue
        checkpoint = _collect(problems, partial(open_checkpoint, path))
        if checkpoint is not None:
            inputs.append(Input(checkpoint, is_base, first))
            first += len(checkpoint.shards)
    return inputs


def _outputs(inputs: Sequence[Input], names: Sequence[str], out_dtype: DType | None) -> list[OutputTensor]:
    tables = [source.checkpoint.tensors for source in inputs]
    outputs = []
    for name in names:
        entry = tables[0][name].entry
        if not entry.dtype.mergeable:
            dtype = entry.dtype
        elif out_dtype is not None:
            dtype = out_dtype
        else:
            dtype = promote({table[name].entry.dtype for table in tables})
        outputs.append(OutputTensor(name, dtype, entry.shape))
    return outputs


def _jobs(
    inputs: Sequence[Input], layouts: Sequence[ShardLayout], files: int, rule: Rule, cast: DType | None
) -> tuple[tuple[TensorJob, ...], ...]:
    """The jobs of each output shard, in the order of its bytes."""
    base = next((source for source in inputs if source.is_base), None)
    experts = [source for source in inputs if not source.is_base]

    def region(source: Input, name: str) -> Region:
        ref = source.checkpoint.tensors[name]
        return Region(ref.entry.dtype, ref.entry.begin, source.first_file + ref.shard)

    def job(layout: ShardLayout, number: int, output: OutputTensor) -> TensorJob:
        first: TensorEntry = inputs[0].checkpoint.tensors[output.name].entry
        merges = first.dtype.mergeable
        return TensorJob(
            name=output.name,
            count=first.count,
            base=region(base, output.name) if base else None,
            experts=tuple([region(source, output.name) for source in experts]),
            out=Region(output.dtype, layout.offsets[output.name], files + number),
            rule=rule if merges else None,
            cast=cast if merges else None,
            row=row_of(first.shape, rule),
        )

    return tuple(
        tuple(job(layout, number, output) for output in layout.tensors)
        for number, layout in enumerate(layouts)
    )


def bytes_read_by(jobs: Sequence[TensorJob]) -> int:
    """Bytes that these jobs read."""
    total = 0
    for job in jobs:
        width = sum(region.dtype.itemsize for region in job.experts)
        width += job.base.dtype.itemsize if job.base else 0
        total += job.count * width * job.reads
    return total
