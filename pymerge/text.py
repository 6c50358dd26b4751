"""Text from outside (names, paths, contents of files), made safe to print."""

from __future__ import annotations

import reprlib


def printable(text: str) -> str:
    """`text` on one line, with what no terminal should be sent (controls, half surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_unicode(text: str) -> bool:
    """Whether it can be written: half a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """`value` for a message: control characters escaped, long names and lists shortened."""
    brief = reprlib.Repr()
    brief.maxstring, brief.maxlist, brief.maxother = 120, 8, 60
    try:
        return brief.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"something too long to be shown ({type(value).__name__})"
