"""python -m pymerge, and the command `pymerge`: what must be right before anything large is imported."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def main() -> None:
    """The command line."""
    signal.signal(signal.SIGINT, _quit)
    _fill_standard_descriptors()
    from pymerge.cli import main as command

    command()


def _quit(number: int, frame: FrameType | None) -> NoReturn:
    """There is nothing to tidy up yet, or no more."""
    os._exit(128 + number)


def _fill_standard_descriptors() -> None:
    """A closed stdout or stderr would give its number to the first file that is opened, and its text too."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


if __name__ == "__main__":
    main()
