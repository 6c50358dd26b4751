"""Reading files that somebody else made: regular ones only, and never more than expected."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymerge.errors import CheckpointError, PymergeError
from pymerge.text import is_unicode

LFS_MAGIC = b"version https://git-lfs"
LFS_POINTER = "a git-LFS pointer and not the file itself; fetch it with `git lfs pull`"

_BLOCK = 1 << 20


class Malformed(ValueError):
    """What is wrong with a text or header, as a clause without the file's name."""


def open_regular(path: Path, kind: type[PymergeError] = CheckpointError) -> int:
    """A read-only descriptor of a regular file, for the caller to close; anything else raises `kind`."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        broken = os.path.islink(path)
        what = "the symbolic link leads to no file" if broken else "the file does not exist"
        raise kind(f"{path}: {what}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(f"{path}: the file cannot be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise kind(f"{path}: this is not a regular file")
    return fd


@contextmanager
def reading(path: Path, kind: type[PymergeError] = CheckpointError) -> Iterator[int]:
    """`open_regular` for a while; OSError and Malformed become `kind` and name the file."""
    fd = open_regular(path, kind)
    try:
        yield fd
    except OSError as error:
        raise kind(f"{path}: the file cannot be read: {error.strerror}") from error
    except Malformed as problem:
        raise kind(f"{path}: {problem}") from None
    finally:
        os.close(fd)


def read_exactly(fd: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`; Malformed when the file ends before them."""
    parts = []
    while count > 0:
        part = os.pread(fd, count, offset)
        if not part:
            raise Malformed(f"the file is truncated: it ends at byte {offset}, expected {count} bytes more")
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def read_file(path: Path, limit: int, kind: type[PymergeError] = CheckpointError) -> bytes:
    """A whole file of at most `limit` bytes; raises `kind`, for a git-LFS pointer too."""
    with reading(path, kind) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise Malformed(f"the file has {size:,} bytes, allowed are at most {limit:,}")
        data = read_exactly(fd, size, 0)
        if data.startswith(LFS_MAGIC):
            raise Malformed(f"this is {LFS_POINTER}")
    return data


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 `data`; else Malformed."""
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the file is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Malformed("the JSON is not an object")
    return found


def object_in(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, the content of `path`; else CheckpointError."""
    try:
        return json_object(data)
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None


def is_path(text: str) -> bool:
    """Whether a path can be written so: valid Unicode without NUL."""
    return bool(text) and "\0" not in text and is_unicode(text)


def is_file_name(name: str) -> bool:
    """Whether `name` can be that of a file in a folder: a path of one component."""
    return is_path(name) and name not in (".", "..") and "/" not in name


def hash_file(fd: int) -> str:
    """The sha256, in hex, of a whole open file; reads 1 MiB at a time."""
    block = memoryview(bytearray(_BLOCK))
    total = hashlib.sha256()
    offset = 0
    while got := os.preadv(fd, [block], offset):
        total.update(block[:got])
        offset += got
    return total.hexdigest()
