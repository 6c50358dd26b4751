"""What can go wrong, as exceptions whose text is one clear sentence for the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pymerge.text import printable

T = TypeVar("T")

PROBLEMS_SHOWN = 20


class PymergeError(Exception):
    """Any problem the user can act on; the command line prints it and exits with 2.

    The sentence may hold names and paths as they are: what a terminal should not be sent is escaped here.
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(printable(str(sentence)))


class RecipeError(PymergeError):
    """The recipe asks for something unknown, contradictory or unsupported."""


class CheckpointError(PymergeError):
    """A checkpoint file is missing, damaged, hostile or not what its header says."""


class OutputError(PymergeError):
    """The output cannot be written where it was asked for."""


class BackendError(PymergeError):
    """A backend is missing or cannot take this input."""


class ProblemList(PymergeError):
    """Several problems found together; `problems` holds one sentence each, the text the first of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(printable, problems))
        Exception.__init__(self, "\n".join(self.shown))

    @property
    def shown(self) -> tuple[str, ...]:
        """The first sentences, and how many more there are."""
        more = len(self.problems) - PROBLEMS_SHOWN
        rest = () if more <= 0 else (f"and {more:,} more problem{'s' if more > 1 else ''}",)
        return (*self.problems[:PROBLEMS_SHOWN], *rest)


def collected(problems: list[str], action: Callable[[], T]) -> T | None:
    """What `action` gives; what it raises is added to `problems`, one sentence each, and it gives None."""
    try:
        return action()
    except ProblemList as error:
        problems.extend(error.problems)
    except PymergeError as error:
        problems.append(str(error))
    return None


class Cancelled(PymergeError):
    """The run was stopped on request; what is finished stays in the staging folder."""
