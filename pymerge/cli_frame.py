"""What every command line here does alike: errors become sentences and exit codes, signals end it tidily."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from pymerge.errors import OutputError, ProblemList, PymergeError
from pymerge.text import printable

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143


class Stopped(BaseException):
    """SIGINT or SIGTERM came; unwinds like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        self.number = number


class Frame(click.Group):
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
            again = "; the same command continues it" if ctx.invoked_subcommand in ("merge", "sweep") else ""
            word, code = _STOPPING[stop.number]
            say(f"pymerge: {word}{again}", err=True)
            sys.stdout.flush()
            os._exit(code)  # all is tidied up; while Python ends, a further signal would change how
        except BrokenPipeError:
            _drop_output(1, 2)
            ctx.exit(EXIT_BROKEN_PIPE)
        except (PymergeError, OSError, MemoryError) as error:
            for sentence in _sentences(error):
                say(f"pymerge: {sentence}", err=True)
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


def say(text: str, *, err: bool = False) -> None:
    """Print lines of text."""
    click.echo(_clean(text), err=err)


def say_last(out: Path, text: str) -> None:
    """Print what a merge did; where that fails the user must hear that the output is there all the same."""
    try:
        say(text)
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
