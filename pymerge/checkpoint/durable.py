"""Writing that survives a crash: reserve, write fully, flush, rename. Raw descriptors only."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pymerge.errors import OutputError

PART = ".part"  # suffix of a file that is not finished and never trusted

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (ValueError: a NUL in the name) into an OutputError that names `path`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) in _NO_SPACE:
            with suppress(OSError):
                found = os.statvfs(path.parent)
                reason += f", {found.f_bavail * found.f_frsize} bytes are free"
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def create_part(path: Path) -> int:
    """A new, empty <path>.part, O_RDWR, with the permissions that the umask leaves."""
    part = part_of(path)
    with suppress(FileNotFoundError):
        os.unlink(part)
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def part_of(path: Path) -> Path:
    """Where `path` lies until it is finished."""
    return path.with_name(path.name + PART)


def reserve(fd: int, size: int) -> None:
    """Claim `size` bytes of disk now rather than fail after hours; a sparse file where that is unknown."""
    if not _fallocate(fd, size):
        os.ftruncate(fd, size)


def _fallocate(fd: int, size: int) -> bool:
    # Not os.posix_fallocate: where a filesystem lacks it, glibc writes to every block instead.
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is None:
        return False
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while function(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in _NO_FALLOCATE:
            return False
        if code != errno.EINTR:
            needed = f", {size} bytes are needed" if code in _NO_SPACE else ""
            raise OSError(code, os.strerror(code) + needed)
    return True


def write_all(fd: int, data: bytes) -> None:
    """All of `data` at the file's beginning, however many calls that takes."""
    view = memoryview(data)
    offset = 0
    while offset < len(view):
        offset += os.pwrite(fd, view[offset:], offset)


def write_file(path: Path, data: bytes) -> None:
    """A whole small file, flushed and then renamed into place; the caller flushes the folder."""
    fd = create_part(path)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(part_of(path), path)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the filesystem can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: a filesystem that does not flush folders
            raise
    finally:
        os.close(fd)


def make_folders(folder: Path) -> tuple[Path, ...]:
    """Make `folder` and its missing parents durably; returns the new ones, outermost first."""
    if os.path.lexists(folder):
        return ()
    made = make_folders(folder.parent)
    os.mkdir(folder)
    flush_folder(folder.parent)
    return (*made, folder)


def size_of(path: Path) -> int | None:
    """Bytes of a file, None when there is none."""
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return None
