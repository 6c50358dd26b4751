"""What a run writes about its own files: the names, the records, and how they are read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from pymerge.errors import CheckpointError, PymergeError
from pymerge.files import Malformed, is_file_name, json_object, read_file
from pymerge.text import shown

PLAN_NAME = "merge.plan.json"
MANIFEST_NAME = "merge.manifest.json"
MAX_BYTES = 100_000_000

# Of one file: its "size" and "sha256", and counts of what was merged into it.
Record: TypeAlias = "dict[str, Any]"


def read_object(path: Path, kind: type[PymergeError] = CheckpointError) -> dict[str, Any] | None:
    """The JSON object in a file of a run, None when there is no file; else `kind`."""
    if not os.path.lexists(path):
        return None
    data = read_file(path, MAX_BYTES, kind)
    try:
        return json_object(data)
    except Malformed as problem:
        raise kind(f"{path}: {problem}") from None


def records_of(manifest: dict[str, Any]) -> dict[str, Record]:
    """The checked records of a manifest by file name; Malformed."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise Malformed("it has no list of files")
    for name, record in files.items():
        if not is_file_name(name):
            raise Malformed(f"it lists {shown(name)}, which is not a file name")
        if not is_record(record):
            raise Malformed(f"it lists {shown(name)} without size and sha256")
    return files


def is_record(value: object) -> bool:
    """Whether `value` is the record of a finished file: sha256 as text, the others whole numbers.

    Counts may be null: of what a device has merged not everything is counted.
    """
    if not isinstance(value, dict) or not value.keys() >= {"size", "sha256"}:
        return False
    counts = (v for key, v in value.items() if key not in ("sha256", "size"))
    sound = isinstance(value["sha256"], str) and type(value["size"]) is int
    return sound and all(count is None or type(count) is int for count in counts)
