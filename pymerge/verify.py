"""Checks a merged checkpoint against its own manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pymerge.checkpoint.manifest import MANIFEST_NAME, Record, read_object, records_of
from pymerge.errors import CheckpointError, ProblemList
from pymerge.files import Malformed, hash_file, reading

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Verified:
    """How much was found to be as the manifest says."""

    files: int
    bytes: int


def verify(out: Path) -> Verified:
    """Hash every file that the manifest of the folder `out` lists.

    Raises CheckpointError (no manifest, or a damaged one) or ProblemList naming each file that differs, and
    weights that the manifest does not know. Other files that somebody added are no problem.
    """
    listed = _listed(out)
    problems = [
        f"{out / name} is not in {MANIFEST_NAME}: a reader of this folder would take it for part of the model"
        for name in sorted(os.listdir(out))
        if name.endswith(WEIGHT_SUFFIXES) and name not in listed
    ]
    for name, record in listed.items():
        try:
            problem = _difference(out / name, record["size"], record["sha256"])
        except CheckpointError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
    if problems:
        raise ProblemList(problems)
    return Verified(len(listed), sum(record["size"] for record in listed.values()))


def _difference(path: Path, size: int, digest: str) -> str | None:
    with reading(path) as fd:
        found = os.fstat(fd).st_size
        if found != size:
            return f"{path} has {found:,} bytes, expected {size:,}"
        actual = hash_file(fd)
    return None if actual == digest else f"{path} differs: sha256 is {actual}, expected {digest}"


def _listed(out: Path) -> dict[str, Record]:
    """Size and sha256 of every file in the manifest, by name; names are single path components."""
    path = out / MANIFEST_NAME
    manifest = read_object(path)
    if manifest is None:
        raise CheckpointError(f"{out} has no {MANIFEST_NAME}, so it is no finished merge")
    try:
        listed = records_of(manifest)
        if not any(name.endswith(WEIGHT_SUFFIXES) for name in listed):
            raise Malformed("it lists no weights")
    except Malformed as problem:
        raise CheckpointError(f"{path} is not a manifest: {problem}") from None
    return listed
