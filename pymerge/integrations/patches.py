"""Methods of another tool replaced by ours: put in, counted, taken out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Any

Function = Callable[..., Any]

# The replacement carries its owner under this name: so it can be found without a global.
_MARK = "pymerge_patches"


class Left(Exception):
    """A merge that is left to the other tool; the text says why, in a few words."""


class Tally:
    """How many merges pymerge made, by method, and how many it left, by method and reason."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()
        self._lock = Lock()  # some tools merge in several threads

    def make(self, method: str) -> None:
        """Counts one that pymerge made."""
        with self._lock:
            self.made[method] += 1

    def leave(self, method: str, reason: str) -> None:
        """Counts one that was left to the other tool."""
        with self._lock:
            self.left[method, reason] += 1


class Patches:
    """What is replaced in one tool while it is enabled; a context manager that takes it out at its end."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.tally = Tally()
        self._places: list[tuple[object, str, Function, Function]] = []

    def replace(self, owner: object, name: str, make: Callable[[Function, Tally], Function]) -> None:
        """Puts `make(original, tally)` where `owner.name` was."""
        original = getattr(owner, name)
        ours = make(original, self.tally)
        setattr(ours, _MARK, self)
        setattr(owner, name, ours)
        self._places.append((owner, name, original, ours))

    def disable(self) -> None:
        """Puts the originals back; what somebody else has put over ours since then stays."""
        while self._places:
            owner, name, original, ours = self._places.pop()
            if getattr(owner, name) is ours:
                setattr(owner, name, original)

    def summary(self) -> str:
        """How many merges took which way, in a line for each reason."""
        made, left = self.tally.made, self.tally.left
        total = made.total() + left.total()
        each = ", ".join(f"{method} {count:,}" for method, count in sorted(made.items()))
        lines = [f"pymerge made {made.total():,} of {total:,} merges{f' ({each})' if each else ''}"]
        lines += [
            f"  left to {self.tool}: {method} {count:,} ({reason})"
            for (method, reason), count in sorted(left.items())
        ]
        return "\n".join(lines)

    def __enter__(self) -> Patches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def patches_of(owner: object, name: str) -> Patches | None:
    """Those that replaced `owner.name`; None where nothing did."""
    return getattr(getattr(owner, name, None), _MARK, None)


def disable(patches: Patches | None) -> None:
    """Gives a tool its own functions back; does nothing where they are in place."""
    if patches is not None:
        patches.disable()


def summary(patches: Patches | None, tool: str) -> str:
    """How many merges pymerge made and why it left the others, since they were put in."""
    return f"pymerge is not enabled in {tool}" if patches is None else patches.summary()
