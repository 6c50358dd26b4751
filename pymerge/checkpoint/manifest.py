"""What a run writes about its own files: the names, the records, and how they are read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from pymerge.errors import CheckpointError, OutputError, PymergeError
from pymerge.files import Malformed, is_file_name, json_object, read_file
from pymerge.text import shown

PLAN_NAME = "merge.plan.json"
MANIFEST_NAME = "merge.manifest.json"
MAX_BYTES = 100_000_000

_DIFFERENCES_SHOWN = 5

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


def differences(found: Any, plan: Mapping[str, Any]) -> list[str]:
    """How the plan that a run wrote down differs from `plan`, the first few; nothing when it does not."""
    lines = list(_differences("", found, plan))
    if lines and all(line.startswith("outputs.") for line in lines):
        count = len(found["outputs"]), len(plan["outputs"])  # all the same but for how it is divided
        return [f"by --max-shard-size the output was {count[0]:,} files, now {count[1]:,}"]
    more = len(lines) - _DIFFERENCES_SHOWN
    return lines if more <= 0 else [*lines[:_DIFFERENCES_SHOWN], f"and {more} more"]


def check_finished(out: Path, digest: Mapping[str, object]) -> None:
    """OutputError unless the folder `out` holds, whole, what a finished run of the plan of `digest` wrote."""
    manifest = read_object(out / MANIFEST_NAME, OutputError)
    if manifest is None:
        raise OutputError(f"{out} exists already and is no finished merge; remove it to have it merged")
    lines = differences(manifest.get("plan") or {}, json.loads(json.dumps(digest)))
    if lines:
        raise OutputError(
            f"{out} is the merge of another plan ({'; '.join(lines)}); remove it to have it merged anew"
        )
    try:
        for name, record in records_of(manifest).items():
            size = os.stat(out / name).st_size
            if size != record["size"]:
                raise Malformed(f"{shown(name)} has {size:,} bytes, expected {record['size']:,}")
    except (Malformed, OSError) as problem:
        what = f"{problem.filename}: {problem.strerror}" if isinstance(problem, OSError) else problem
        raise OutputError(f"{out} was changed after it was merged: {what}; remove it to start anew") from None


def _differences(where: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(f"{where}.{key}" if where else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{where}[{number}]", before, after)
    elif isinstance(old, str) and isinstance(new, str) and "\n" in old + new:
        lines = zip_longest(old.splitlines(), new.splitlines())
        yield from (_change(f"{where} line {i}", a, b) for i, (a, b) in enumerate(lines, 1) if a != b)
    elif old != new:
        yield _change(where, old, new)


def _change(where: str, old: Any, new: Any) -> str:
    return f"{where}: was {shown(old)}, now {shown(new)}"
