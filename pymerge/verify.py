"""Checks a merged checkpoint against its own manifest."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pymerge.checkpoint.header import shown, shown_path
from pymerge.checkpoint.staging import MANIFEST_NAME, hash_file
from pymerge.errors import CheckpointError, ProblemList

MAX_MANIFEST_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Verified:
    """How much was found to be as the manifest says."""

    files: int
    bytes: int


def verify(out: Path) -> Verified:
    """Hash every file that the manifest of the folder `out` lists.

    Raises CheckpointError (no manifest, or a damaged one) or ProblemList naming each file that differs.
    """
    listed = _listed(out)
    problems = []
    total = 0
    for name, (size, digest) in listed.items():
        path = out / name
        try:
            found = os.stat(path).st_size
            problem = _difference(path, found, size, digest)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            problems.append(f"{shown_path(path)} {problem}")
        total += size
    if problems:
        raise ProblemList(problems)
    return Verified(len(listed), total)


def _difference(path: Path, found: int, size: int, digest: str) -> str | None:
    if not path.is_file():
        return "is not a regular file"
    if found != size:
        return f"has {found:,} bytes, expected {size:,}"
    actual = hash_file(path)
    return None if actual == digest else f"differs: sha256 is {actual}, expected {digest}"


def _listed(out: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file in the manifest, by name; names are single path components."""
    path = out / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_MANIFEST_BYTES))
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{shown_path(out)} has no {MANIFEST_NAME}, so it is no finished merge"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{shown_path(path)} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{shown_path(path)} is not a manifest: {error}") from error
    for name, (size, digest) in listed.items():
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{shown_path(path)} lists {shown(name)}, which is not a file name")
        if type(size) is not int or not isinstance(digest, str):
            raise CheckpointError(f"{shown_path(path)} lists {shown(name)} without size and sha256")
    return listed
