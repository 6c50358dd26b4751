"""The command line. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pymerge.cli_frame import Frame, say, say_last
from pymerge.version import VERSION

if TYPE_CHECKING:
    from pymerge.plan_chain import Stage
    from pymerge.plan_variants import Variant
    from pymerge.sweep_settings import Value

EXIT_DIFFERENT = 1

LARGEST_TILE = 1 << 24  # elements; every thread holds one of each input

_PATH = click.Path(path_type=Path)


def _shared(command: Any) -> Any:
    """The options that a plan depends on."""
    for option in (
        click.option(
            "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest output file."
        ),
        click.option("--dtype", metavar="TYPE", help="Element type of the output, before the recipe's."),
        click.option(
            "--intermediate-dir",
            type=_PATH,
            metavar="DIR",
            help="Where documents that have names are merged, DIR/NAME.  [default: OUT.parts]",
        ),
        click.option("--threads", type=click.IntRange(1, 1024), help="Workers.  [default: processors]"),
        click.option("--max-memory", metavar="SIZE", help="Limit for buffers, such as 200MB."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        command = option(command)
    return command


@click.group(cls=Frame, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="pymerge")
def main() -> None:
    """Merge model checkpoints: exact, in one pass, in little memory."""


@main.command()
@click.argument("recipe", type=_PATH)
@click.argument("out", type=_PATH)
@_shared
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "triton"]),
    default="cpu",
    show_default=True,
    help="Who merges; a GPU gives the same bits.",
)
@click.option("--tile", type=click.IntRange(64, LARGEST_TILE), hidden=True)
@click.option("--isa", default="auto", hidden=True)
def merge(
    recipe: Path,
    out: Path,
    max_shard_size: str,
    dtype: str | None,
    intermediate_dir: Path | None,
    threads: int | None,
    max_memory: str | None,
    as_json: bool,
    quiet: bool,
    backend: str,
    tile: int | None,
    isa: str,
) -> None:
    """Merge as the YAML file RECIPE says into the new folder OUT.

    OUT appears complete or not at all. An interrupted merge continues when the same command runs again. Of
    several YAML documents those that have names are merged first, and stay in DIR.
    """
    from pymerge.api import plan_documents
    from pymerge.backends.native import Isa
    from pymerge.run.settings import settings_for, start_for
    from pymerge.run.stages import execute_stages

    known = {member.name.lower(): member for member in Isa}
    if isa not in known:
        raise click.UsageError(f"--isa {isa} is not known; known are {', '.join(known)}")
    stages = plan_documents(
        recipe, out, intermediate_dir=intermediate_dir, max_shard_size=max_shard_size, dtype=dtype
    )
    memory = _size(max_memory)

    settings_of = partial(settings_for, threads=threads, max_memory=memory, tile=tile, isa=known[isa])
    start = start_for(backend, threads=threads, max_memory=memory)
    if not (quiet or as_json):
        _show_notes(stages)
    found = []
    for stage, summary in execute_stages(stages, settings_of, start, None if quiet else sys.stderr):
        target = stage.out or out
        found.append({"name": stage.name, **(summary.as_dict() if summary else {"out": str(target)})})
        if not (quiet or as_json):
            say_last(target, summary.describe() if summary else f"{target}: merged before, kept")
    if as_json:
        *before, last = found
        del last["name"]
        say_last(out, json.dumps({**last, "intermediates": before} if before else last, indent=2))


@main.command()
@click.argument("recipe", type=_PATH)
@click.argument("out", type=_PATH, required=False)
@_shared
def plan(
    recipe: Path,
    out: Path | None,
    max_shard_size: str,
    dtype: str | None,
    intermediate_dir: Path | None,
    threads: int | None,
    max_memory: str | None,
    as_json: bool,
) -> None:
    """Show what merging RECIPE (into OUT) would do; reads headers only and reports every problem at once."""
    from pymerge.api import plan_documents
    from pymerge.plan_memory import budget

    stages = plan_documents(
        recipe, out, intermediate_dir=intermediate_dir, max_shard_size=max_shard_size, dtype=dtype
    )
    numbers, texts = [], []
    for stage in stages:
        shares = budget(stage.planned, threads, _size(max_memory))
        memory = {"memory": shares.total, "memory_with_gpu": shares.total_with_gpu}
        numbers.append({**stage.summary(), **memory, "threads": shares.threads})
        title = f"document     {stage.name or 'the output'}\n" if len(stages) > 1 else ""
        texts.append(
            f"{title}{stage.describe()}\n"
            f"memory       {shares.total:,} bytes for {shares.threads} threads, beside the interpreter;"
            f" at most {shares.total_with_gpu:,} with a GPU backend"
        )
    if as_json:
        say(json.dumps({"documents": numbers} if len(stages) > 1 else numbers[0], indent=2))
        return
    say("\n\n".join(texts))
    _show_notes(stages)


_VALUES = "V1,V2,..."


def _show_sweep(variants: Sequence[Variant], as_json: bool) -> None:
    """What a sweep would merge: its outputs, and what the first is merged by."""
    waiting = [variant.plan for variant in variants if not variant.done]
    if as_json:
        rows = [
            {"setting": one.setting, "out": str(one.out), "done": one.done, **one.plan.summary()}
            for one in variants
        ]
        say(json.dumps(rows, indent=2))
        return
    for variant in variants:
        say(f"{variant.out}{': merged before, kept' if variant.done else ''}")
    disk = sum(plan.disk_bytes for plan in waiting)
    say(f"{len(waiting)} to merge, {disk:,} bytes on disk")
    for note in dict.fromkeys(note for plan in waiting for note in plan.notes):
        say(f"note: {note}", err=True)


@main.command()
@click.argument("recipe", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--density", metavar=_VALUES, multiple=True, help="Densities, for all models.")
@click.option("--weight", metavar=_VALUES, multiple=True, help="Weights, for all models.")
@click.option(
    "--lambda", "lambda_", metavar=_VALUES, multiple=True, help="Factors on the merged task vector."
)
@click.option(
    "--set",
    "others",
    metavar=f"NAME={_VALUES}",
    multiple=True,
    help="Any other parameter, or seed; of one model: weight@MODEL=0.5,1.",
)
@click.option(
    "--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Largest output file."
)
@click.option("--dtype", metavar="TYPE", help="Element type of the outputs, before the recipe's.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Workers.  [default: processors]")
@click.option("--max-memory", metavar="SIZE", help="Limit for buffers, such as 200MB.")
@click.option("--dry-run", is_flag=True, help="Only show what would be merged.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def sweep(
    recipe: Path,
    out: Path,
    density: tuple[str, ...],
    weight: tuple[str, ...],
    lambda_: tuple[str, ...],
    others: tuple[str, ...],
    max_shard_size: str,
    dtype: str | None,
    threads: int | None,
    max_memory: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge RECIPE with every combination of the given values, each into a folder of OUT.

    The inputs are read together. Every output is what `merge` makes of the recipe with these parameters, bit
    for bit. An interrupted sweep continues when the same command runs again.
    """
    from pymerge.api import plan_sweep
    from pymerge.api import sweep as swept

    values: dict[str, list[Value]] = {}
    for name, texts in (("density", density), ("weight", weight), ("lambda", lambda_)):
        for text in texts:
            values.setdefault(name, []).extend(_values(name, text))
    for option in others:
        name, is_given, text = option.partition("=")
        if not is_given:
            raise click.UsageError(f"--set {option}: expected NAME={_VALUES}")
        values.setdefault(name, []).extend(_values(name, text))
    if not values:
        raise click.UsageError("a sweep needs values: --density, --weight, --lambda or --set")
    if dry_run:
        _show_sweep(plan_sweep(recipe, out, values, max_shard_size=max_shard_size, dtype=dtype), as_json)
        return
    results = swept(
        recipe,
        out,
        values,
        threads=threads,
        max_memory=_size(max_memory),
        max_shard_size=max_shard_size,
        dtype=dtype,
        progress=not quiet,
    )
    if as_json:
        rows = [
            {
                "setting": result.setting,
                **(result.summary.as_dict() if result.summary else {"out": str(result.out)}),
            }
            for result in results
        ]
        say_last(out, json.dumps(rows, indent=2))
    elif not quiet:
        merged = [result.summary for result in results if result.summary]
        for note in dict.fromkeys(note for summary in merged for note in summary.notes):
            say(f"note: {note}", err=True)
        for result in results:
            say_last(out, f"{result.out}{'' if result.summary else ': merged before, kept'}")
            if result.summary and result.summary.nan_outputs:
                say_last(out, f"warning: {result.summary.nan_outputs:,} of its elements are NaN")
        if merged:
            last = merged[-1]
            many = f"{len(merged)} merge{'s' if len(merged) > 1 else ''} in {last.seconds:.2f} s"
            amounts = f"{last.bytes_read:,} bytes read, peak memory {last.peak_memory / 1e6:,.0f} MB"
            say_last(out, f"{many}, {amounts}")


def _values(name: str, text: str) -> list[Value]:
    """Numbers, true, false and words as YAML reads them. Raises RecipeError."""
    from pymerge.recipe_yaml import read_yaml

    found = [read_yaml(part)[0][1] if part.strip() else "" for part in text.split(",")]
    if not all(isinstance(value, (bool, int, float, str)) and value != "" for value in found):
        raise click.UsageError(f"{name}: {text!r} is not a list of values such as 0.1,0.2")
    return cast("list[Value]", found)


@main.command()
@click.argument("folder", type=_PATH, required=False)
def demo(folder: Path | None) -> None:
    """Make a base and eight experts, merge them by every method, check and time the results.

    The files stay when FOLDER is given.
    """
    from pymerge.demo import run_demo

    if not run_demo(folder, say):
        sys.exit(EXIT_DIFFERENT)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show versions, processor features, threads and backends."""
    from pymerge.info import gather

    facts = gather()
    if as_json:
        say(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        say(f"{name:<16} {text}")


@main.command()
def methods() -> None:
    """List the merge methods and their defaults."""
    from pymerge.explaining import defaults_in_words
    from pymerge.methods import METHODS
    from pymerge.presets import Defaults

    for method in METHODS.values():
        say(f"{method.name:<16} {method.summary}")
        say(f"{'':<16} {', '.join(defaults_in_words(method, Defaults())) or 'no parameters'}")


@main.command()
@click.argument("method")
@click.option(
    "--preset",
    type=click.Choice(["mergekit", "paper", "peft", "fusionbench"]),
    default="mergekit",
    show_default=True,
    help="Whose defaults to show.",
)
def explain(method: str, preset: str) -> None:
    """Show what METHOD needs and does: statistics, stages, passes over the inputs, bytes."""
    from pymerge.explaining import explain as explained
    from pymerge.methods import method_named
    from pymerge.parameters import Preset

    say(explained(method_named(method), Preset(preset)))


@main.command()
@click.argument("out", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(out: Path, as_json: bool) -> None:
    """Hash the files of the merged checkpoint OUT again and compare with its manifest."""
    from pymerge.verify import verify as verified

    result = verified(out)
    if as_json:
        say(json.dumps({"files": result.files, "bytes": result.bytes, "intact": True}))
    else:
        say(f"{out}: {result.files} files verified, {result.bytes:,} bytes, all as the manifest says")


@main.command()
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@click.option("--all", "everything", is_flag=True, help="List every tensor that differs, not the worst 20.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every tensor that differs.")
def diff(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Compare the checkpoints A and B bit by bit; exits with 1 when they differ."""
    from pymerge.diff import describe
    from pymerge.diff import diff as compared

    difference = compared(a, b)
    say(json.dumps(difference.as_dict(), indent=2) if as_json else describe(difference, everything))
    if not difference.is_equal:
        sys.exit(EXIT_DIFFERENT)


def _show_notes(stages: Sequence[Stage]) -> None:
    for stage in stages:
        where = f"{stage.name}: " if stage.name else ""
        for note in stage.notes:
            say(f"note: {where}{note}", err=True)


def _size(text: str | None) -> int | None:
    from pymerge.checkpoint.layout import parse_size

    return None if text is None else parse_size(text)
