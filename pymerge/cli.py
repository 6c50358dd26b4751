"""The command line. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pymerge.errors import OutputError, ProblemList, PymergeError
from pymerge.text import printable
from pymerge.version import VERSION

if TYPE_CHECKING:
    from pymerge.plan_chain import Stage
    from pymerge.planner import Plan

EXIT_DIFFERENT = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

LARGEST_TILE = 1 << 24  # elements; every thread holds one of each input

_PATH = click.Path(path_type=Path)


class Stopped(BaseException):
    """SIGINT or SIGTERM came; unwinds like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Group(click.Group):
    """Turns the program's own errors into a sentence on stderr and an exit code, without a traceback."""

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        with _clean_usage():
            return super().make_context(*given, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        before = {number: signal.signal(number, _stop) for number in _STOPPING}
        try:
            with _clean_usage():
                return super().invoke(ctx)
        except Stopped as stop:
            again = "; the same command continues it" if ctx.invoked_subcommand == "merge" else ""
            word, code = _STOPPING[stop.number]
            _say(f"pymerge: {word}{again}", err=True)
            sys.stdout.flush()
            os._exit(code)  # all is tidied up; while Python ends, a further signal would change how
        except BrokenPipeError:
            _drop_output(1, 2)
            ctx.exit(EXIT_BROKEN_PIPE)
        except (PymergeError, OSError, MemoryError) as error:
            for sentence in _sentences(error):
                _say(f"pymerge: {sentence}", err=True)
            ctx.exit(EXIT_ERROR)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _sentences(error: Exception) -> Sequence[str]:
    if isinstance(error, ProblemList):
        return error.shown
    if isinstance(error, MemoryError):
        return ["out of memory; try fewer --threads or a smaller --max-memory"]
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename is not None else ""
        return [f"{what}{error.strerror or error}"]
    return [str(error)]


@contextmanager
def _clean_usage() -> Iterator[None]:
    """What click says of wrong options repeats them."""
    try:
        yield
    except click.UsageError as error:
        said = error.format_message()
        if _clean(said) == said:
            raise
        raise click.UsageError(_clean(said), error.ctx) from None


def _say(text: str, *, err: bool = False) -> None:
    """Print lines of text."""
    click.echo(_clean(text), err=err)


def _say_last(out: Path, text: str) -> None:
    """Print what a merge did; where that fails the user must hear that the output is there all the same."""
    try:
        _say(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output(1)
        raise OutputError(
            f"{out} is complete, but what was done cannot be printed: {error.strerror}"
        ) from None


def _clean(text: str) -> str:
    """`text` as it is but for what no terminal should be sent, which is escaped."""
    return "\n".join(map(printable, text.split("\n")))


def _drop_output(*fds: int) -> None:
    """Nobody reads on: what is still in the buffer must not be written at exit either."""
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


_STOPPING: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", EXIT_INTERRUPTED),
    signal.SIGTERM: ("terminated", EXIT_TERMINATED),
}


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Unwinds once: a second signal must not break into the tidying up, which takes moments."""
    for stopping in _STOPPING:  # not SIG_IGN: Python complains of a signal that comes while that is being set
        signal.signal(stopping, _take_no_notice)
    raise Stopped(number)


def _take_no_notice(number: int, frame: FrameType | None) -> None:
    """For signals while the process is ending already."""


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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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
    from pymerge.backends.native import Isa, Settings
    from pymerge.run.settings import settings_for, start_for
    from pymerge.run.stages import execute_stages

    known = {member.name.lower(): member for member in Isa}
    if isa not in known:
        raise click.UsageError(f"--isa {isa} is not known; known are {', '.join(known)}")
    stages = plan_documents(
        recipe, out, intermediate_dir=intermediate_dir, max_shard_size=max_shard_size, dtype=dtype
    )
    memory = _size(max_memory)

    def settings_of(planned: Plan) -> Settings:
        return settings_for(planned, threads=threads, max_memory=memory, tile=tile, isa=known[isa])

    start = start_for(backend, threads=threads, max_memory=memory)
    if not (quiet or as_json):
        _show_notes(stages)
    found = []
    for stage, summary in execute_stages(stages, settings_of, start, None if quiet else sys.stderr):
        target = stage.out or out
        found.append({"name": stage.name, **(summary.as_dict() if summary else {"out": str(target)})})
        if not (quiet or as_json):
            _say_last(target, summary.describe() if summary else f"{target}: merged before, kept")
    if as_json:
        *before, last = found
        del last["name"]
        _say_last(out, json.dumps({**last, "intermediates": before} if before else last, indent=2))


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
        _say(json.dumps({"documents": numbers} if len(stages) > 1 else numbers[0], indent=2))
        return
    _say("\n\n".join(texts))
    _show_notes(stages)


@main.command()
@click.argument("folder", type=_PATH, required=False)
def demo(folder: Path | None) -> None:
    """Make a base and eight experts, merge them by every method, check and time the results.

    The files stay when FOLDER is given.
    """
    from pymerge.demo import run_demo

    if not run_demo(folder, _say):
        sys.exit(EXIT_DIFFERENT)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Show versions, processor features, threads and backends."""
    from pymerge.info import gather

    facts = gather()
    if as_json:
        _say(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        _say(f"{name:<16} {text}")


@main.command()
def methods() -> None:
    """List the merge methods and their defaults."""
    from pymerge.explaining import own_defaults
    from pymerge.methods import METHODS

    for method in METHODS.values():
        _say(f"{method.name:<16} {method.summary}")
        flags = f"trim {method.trim.value}, elect {_yes(method.elect)}"
        flags += f", normalize {_yes(method.normalize)}, rescale {_yes(method.rescale)}"
        _say(f"{'':<16} {', '.join(own_defaults(method)) or flags}")


@main.command()
@click.argument("method")
def explain(method: str) -> None:
    """Show what METHOD needs and does: statistics, stages, passes over the inputs, bytes."""
    from pymerge.explaining import explain as explained
    from pymerge.methods import method_named

    _say(explained(method_named(method)))


@main.command()
@click.argument("out", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(out: Path, as_json: bool) -> None:
    """Hash the files of the merged checkpoint OUT again and compare with its manifest."""
    from pymerge.verify import verify as verified

    result = verified(out)
    if as_json:
        _say(json.dumps({"files": result.files, "bytes": result.bytes, "intact": True}))
    else:
        _say(f"{out}: {result.files} files verified, {result.bytes:,} bytes, all as the manifest says")


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
    _say(json.dumps(difference.as_dict(), indent=2) if as_json else describe(difference, everything))
    if not difference.is_equal:
        sys.exit(EXIT_DIFFERENT)


def _show_notes(stages: Sequence[Stage]) -> None:
    for stage in stages:
        where = f"{stage.name}: " if stage.name else ""
        for note in stage.notes:
            _say(f"note: {where}{note}", err=True)


def _size(text: str | None) -> int | None:
    from pymerge.checkpoint.layout import parse_size

    return None if text is None else parse_size(text)


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
