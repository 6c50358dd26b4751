"""From a recipe to jobs: reads headers only, and reports every problem they can show together.

The plan is complete: output files, their headers and offsets, and for each output tensor where its
inputs lie. Nothing is decided later than here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.index import Shard
from pymerge.checkpoint.layout import ShardLayout, lay_out, stem_like
from pymerge.checkpoint.manifest import check_finished
from pymerge.checkpoint.sidefiles import CONFIG_NAME, states_layers
from pymerge.collector import collector_paused
from pymerge.dtypes import DType
from pymerge.errors import ProblemList, collected
from pymerge.explaining import numbers_of
from pymerge.job import Product, TensorJob, bytes_of, products_of
from pymerge.methods import Method, method_named
from pymerge.parameters import Preset
from pymerge.plan_checks import (
    Input,
    check_configs,
    check_output,
    free_bytes,
)
from pymerge.plan_inputs import open_inputs
from pymerge.plan_jobs import Found, jobs_of, outputs_of
from pymerge.plan_modules import examine_modules, parts_of_modules
from pymerge.plan_rule import Part, donor_path, identity
from pymerge.plan_side import carried, side_files
from pymerge.plan_text import describe_parts, notes_of, notes_of_jobs, notes_of_rules, parameters_of
from pymerge.plan_vocabulary import Vocabulary, remap
from pymerge.recipe import Draft, Recipe
from pymerge.rule import Rule, Scope
from pymerge.text import shown
from pymerge.version import NUMERICS_VERSION, VERSION

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Plan:
    """Everything about one merge that headers can tell.

    `inputs`: bases first (where the method has one), then the experts in recipe order.
    `parts`: the slices of the output, or all of it; `counts`: how many layers each has, as far as is known.
    `rules`: those of the jobs, without repetition.
    `shards`: all input files by number; output file i has the number `len(shards) + i` in the jobs' regions.
    `side_files`: what lies beside the weights (configuration and tokenizer of the base, recipe, index).
    `notes`: what the recipe gives and the method does not use, one sentence each. `vocabulary`: the output's,
    where the recipe asks for one.
    """

    recipe: Recipe
    method: Method
    rules: tuple[Rule, ...]
    parts: tuple[Part, ...]
    counts: tuple[int, ...]
    out: Path | None
    out_dtype: DType | None
    inputs: tuple[Input, ...]
    side_files: Mapping[str, bytes]
    shards: tuple[Shard, ...]
    layouts: tuple[ShardLayout, ...]
    jobs: tuple[tuple[TensorJob, ...], ...]
    shard_bytes: tuple[int, ...]
    bytes_written: int
    notes: tuple[str, ...]
    vocabulary: Vocabulary | None = None

    @property
    def scope(self) -> Scope:
        """What the thresholds are taken over."""
        return self.rules[0].scope

    @property
    def bytes_read(self) -> int:
        """Bytes that the jobs read; `shard_bytes` has them for each output file."""
        return sum(self.shard_bytes)

    @property
    def passes(self) -> int:
        """How often the inputs are read, at most; small tensors perhaps less often."""
        return max((job.reads for shard in self.jobs for job in shard), default=1)

    @property
    def experts(self) -> int:
        """How many models are merged, those that are only a task-vector method's base not counted."""
        return sum(not source.is_base for source in self.inputs)

    @property
    def streams(self) -> int:
        """How many inputs a tensor has, at most."""
        return max(len(part.members) for part in self.parts)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk: the weights and what lies beside them, a few kilobytes apart."""
        return self.bytes_written + sum(map(len, self.side_files.values()))

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return sum(len(shard) for shard in self.jobs)

    @property
    def types(self) -> list[str]:
        """The output's element types, that of most elements first."""
        elements: Counter[str] = Counter()
        for shard in self.jobs:
            for job in shard:
                elements[job.out.dtype.torch_name] += job.count
        return [name for name, _ in elements.most_common()]

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
            "vocabulary": self.vocabulary.digest if self.vocabulary else None,
            # Of a LoRA's configuration, which no header holds.
            "products": [
                [job.name, product.scale, product.transposed]
                for shard in self.jobs
                for job in shard
                for product in _products(job)
            ],
            "outputs": {layout.file_name: layout.size for layout in self.layouts},
        }

    def describe(self) -> str:
        """The plan in words, one fact a line."""
        # What holds for all tensors; the lines of the parts say what varies.
        every = [numbers_of(self.method, rule) for rule in self.rules]
        said = [number for number in every[0] if all(number in others for others in every)] if every else []
        preset = self.recipe.preset
        said = [f"preset {preset.value}", *said] if preset is not Preset.MERGEKIT else said
        lines = [", ".join([f"method       {self.method.name}", *said])]
        at = 0
        for name, module in self.recipe.split:
            end = at + len(module.stack)
            lines += [f"module       {shown(name)}"] if name else []
            lines += describe_parts(module, self.method, self.parts[at:end], self.counts[at:end])
            at = end
        lines += self.vocabulary.lines if self.vocabulary else ()
        lines += [
            f"tensors      {self.tensors:,}, elements {self.elements:,}",
            f"read         {self.bytes_read:,} bytes, passes over the inputs: {self.passes}",
            f"write        {self.bytes_written:,} bytes, files: {len(self.layouts)},"
            f" {' and '.join(self.types) or 'no elements'}",
        ]
        if self.out is not None:
            lines.append(f"disk space   {self.disk_bytes:,} bytes needed, {free_bytes(self.out):,} free")
        return "\n".join(lines)

    def _parameters(self) -> list[dict[str, object]]:
        """Those of each slice or module, or of all."""
        found: list[dict[str, object]] = []
        for name, module in self.recipe.split:
            parts = self.parts[len(found) : len(found) + len(module.stack)]
            where = {"module": name} if name else {}
            found += [{**where, **said} for said in parameters_of(module, self.method, parts)]
        return found

    def summary(self) -> dict[str, object]:
        """The plan in numbers (bytes, counts), JSON-ready."""
        return {
            "method": self.method.name,
            "scope": self.scope.value,
            "base": next((str(source.checkpoint.path) for source in self.inputs if source.is_base), None),
            "experts": [str(source.checkpoint.path) for source in self.inputs if not source.is_base],
            "parameters": self._parameters(),
            "seed": self.recipe.seed,
            "preset": self.recipe.preset.value,
            "types": self.types,
            "tensors": self.tensors,
            "elements": self.elements,
            "slices": sum(len(module.slices) for _, module in self.recipe.split),
            "modules": list(self.recipe.modules),
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
    with collector_paused():
        return _planned(recipe if isinstance(recipe, Draft) else Draft(recipe), out, max_shard_bytes, dtype)


def plan_or_find(draft: Draft, out: Path | None, **options: Any) -> tuple[Plan, bool]:
    """The plan, and whether its merge lies at `out` already. OutputError where something else does."""
    done = out is not None and os.path.lexists(out)
    plan = make_plan(draft, None if done else out, **options)
    if done and out is not None:
        check_finished(out, plan.digest())
    return plan, done


def _planned(draft: Draft, out: Path | None, max_shard_bytes: int, dtype: DType | None) -> Plan:
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


def _examine(
    recipe: Recipe, missing: Collection[Path], out: Path | None, problems: list[str]
) -> Found | None:
    """Everything that recipe, headers and side files show; problems are added to the list."""
    notes = list(recipe.notes)
    # A draft without a method says so itself.
    method = collected(problems, lambda: method_named(recipe.method)) if recipe.method else None
    parts = parts_of_modules(recipe, method, problems, notes)
    inputs = open_inputs([part for some in parts for part in some], missing, recipe.adapted, problems, notes)
    check_configs(list(inputs.values()), problems)
    donor = donor_path(recipe)
    complete = len(inputs) == len({identity(m.path) for some in parts for p in some for m in p.members})
    inputs, vocabulary = remap(recipe, inputs, donor, missing, complete, problems)
    merged = examine_modules(recipe, method, parts, inputs, problems, notes)
    unties = any(source.lends and source.home == donor for source in inputs.values())
    side_files = (
        {} if donor in missing else collected(problems, lambda: carried(recipe, donor, vocabulary, unties))
    )
    if out is not None:
        check_output(out, [path for path in recipe.paths if path not in missing], problems)
    if method is None or merged.rules is None or side_files is None:
        return None
    notes += [*notes_of(recipe, merged.outline.origins), *notes_of_rules(merged.rules)]
    config = side_files.get(CONFIG_NAME)
    layers = merged.outline.layers
    if layers and config is not None and not states_layers(config):
        notes.append(f"config.json states no number of layers; the output has {len(layers)}")
    return Found(
        method,
        merged.parts,
        merged.main,
        list(inputs.values()),
        merged.members,
        merged.outline,
        merged.rules,
        side_files,
        notes,
        vocabulary,
    )


def _laid_out(
    recipe: Recipe, found: Found, out: Path | None, max_shard_bytes: int, dtype: DType | None
) -> Plan:
    out_dtype = dtype or recipe.out_dtype or recipe.dtype
    donor = donor_path(recipe)
    layouts = lay_out(outputs_of(found, out_dtype), max_shard_bytes, _stem(found.inputs, donor))
    shards = tuple(shard for source in found.inputs for shard in source.checkpoint.shards)
    jobs = jobs_of(found, layouts, len(shards), recipe.dtype)
    used = {id(job.rule): job.rule for shard in jobs for job in shard if job.rule}
    sides = side_files(donor, found.side_files, recipe.text, layouts, jobs, found.outline.layers)
    return Plan(
        recipe=recipe,
        method=found.method,
        rules=tuple(used.values()) or (found.rules[0],),
        parts=tuple(found.main),
        counts=tuple(found.outline.counts),
        out=out,
        out_dtype=out_dtype,
        inputs=tuple(found.inputs),
        shards=shards,
        side_files=sides,
        layouts=layouts,
        jobs=jobs,
        shard_bytes=tuple(map(_bytes_read_by, jobs)),
        bytes_written=sum(layout.size for layout in layouts),
        notes=tuple(dict.fromkeys([*found.notes, *notes_of_jobs(recipe, found.method, jobs)])),
        vocabulary=found.vocabulary,
    )


def _stem(inputs: Sequence[Input], donor: Path) -> str:
    """Files are called as those of the model whose configuration the output gets."""
    like = next((source for source in inputs if source.home == donor), inputs[0])
    return stem_like(like.checkpoint.shards[0].path.name)


def _bytes_read_by(jobs: Sequence[TensorJob]) -> int:
    """Bytes that these jobs read."""
    return sum(sum([bytes_of(source, job.count) for source in job.inputs]) * job.reads for job in jobs)


def _products(job: TensorJob) -> list[Product]:
    return [product for source in job.inputs for product in products_of(source)]
