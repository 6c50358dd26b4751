"""The commit protocol: a model is written beside its final place and published by one rename.

    <out>.partial/                     same filesystem as the output; flock on .lock
      merge.plan.json                  what this run is made of; a resume must match it
      model-....safetensors.part       being written; never trusted, removed by the next run
      model-....safetensors + .done    finished and flushed; .done is the shard's commit
      side files, index, merge.manifest.json (last)
    rename to <out>, flush the parent  the commit

Every file is flushed before it is renamed and its folder after. With the manifest in place only the
rename is left. A flush that failed is never tried again: the file is thrown away, because the
kernel may have dropped the very pages that it could not write.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pymerge.checkpoint.durable import (
    PART,
    create_part,
    flush_folder,
    make_folders,
    part_of,
    reserve,
    size_of,
    write_all,
    write_file,
    writing,
)
from pymerge.checkpoint.layout import ShardLayout
from pymerge.checkpoint.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    Record,
    differences,
    is_record,
    read_object,
    records_of,
)
from pymerge.errors import CheckpointError, OutputError, PymergeError
from pymerge.files import Malformed, hash_file
from pymerge.text import shown

LOCK_NAME = ".lock"
PARTIAL = ".partial"

_DONE = ".done"
_LOCK_ATTEMPTS = 5


class Staging:
    """The staging folder of one output; a context manager made by `Staging.open`.

    Leaving it by a PymergeError before any shard was finished removes the folder; otherwise it
    stays, and the same command resumes. Shards may be created and finished from several threads.
    """

    def __init__(self, out: Path, lock: int, plan: Mapping[str, Any], made: tuple[Path, ...]) -> None:
        self.out = out
        self.folder = _folder_of(out)
        self._lock = lock
        self._plan = plan
        self._made = made  # parents of the output that did not exist before
        self._published: dict[str, Record] | None = None  # every file, once the manifest lists them
        self._records: dict[str, Record] = {}
        self._open_shards: set[int] = set()

    @classmethod
    def open(cls, out: Path, digest: Mapping[str, object]) -> Staging:
        """Take the lock and start, or resume the run that `digest` (any JSON) describes.

        Raises OutputError when `out` exists, another run holds the lock, the folder belongs to a
        different plan (the differences are shown) or cannot be written.
        """
        out = Path(os.path.abspath(out))
        plan = json.loads(json.dumps(digest))
        with writing(out):
            _refuse_existing(out)
            _refuse_foreign(_folder_of(out))
            made = make_folders(out.parent)
            staging = cls(out, _take_lock(out), plan, made)
        fresh = False
        try:
            with writing(staging.folder):
                fresh = not staging._resumes()
                if fresh:
                    write_file(staging.folder / PLAN_NAME, _json_bytes(plan))
                    flush_folder(staging.folder)
                elif staging._published is None:
                    staging._clean()
        except BaseException as error:
            staging._leave(remove=fresh and isinstance(error, PymergeError))
            raise
        return staging

    def _resumes(self) -> bool:
        """Whether the folder holds an earlier run of this plan; OutputError when of another."""
        manifest = _read_own(self.folder / MANIFEST_NAME)
        if manifest is not None:
            try:
                self._published = records_of(manifest)
            except Malformed as problem:
                raise _damaged(self.folder / MANIFEST_NAME, problem) from None
        # The manifest repeats the plan, whose own file is removed before the last rename.
        found = manifest.get("plan") or {} if manifest else _read_own(self.folder / PLAN_NAME)
        if found is not None:
            _refuse_difference(self.folder, found, self._plan)
        return found is not None

    def _clean(self) -> None:
        """Remove all that a killed run left without finishing it."""
        names = set(os.listdir(self.folder))
        finished = {name for name in names if name + _DONE in names}
        keep = {LOCK_NAME, PLAN_NAME, *finished, *(name + _DONE for name in finished)}
        for name in sorted(names - keep):
            os.unlink(self.folder / name)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(remove=isinstance(error, PymergeError) and not self._anything_finished())

    def _anything_finished(self) -> bool:
        try:
            names = os.listdir(self.folder)
        except OSError:  # published, so finished
            return True
        return any(name.endswith(_DONE) or name == MANIFEST_NAME for name in names)

    def done(self, layout: ShardLayout) -> Record | None:
        """The record of a shard that an earlier run finished, else None."""
        name = layout.file_name
        listed = self._published or {}
        with writing(self.folder / name):
            record = listed.get(name) or _read_own(self.folder / (name + _DONE))
            size = size_of(self.folder / name)
        if record is None or not is_record(record) or not size == record["size"] == layout.size:
            if listed:
                raise OutputError(
                    f"{self.folder / name}: the finished file was changed, it has {size} bytes,"
                    f" expected {layout.size}; remove the folder to start anew"
                )
            return None
        self._records[name] = record
        return dict(record)

    def create(self, layout: ShardLayout) -> int:
        """A descriptor of the shard's .part file, O_RDWR, its space reserved and its header written.

        The descriptor belongs to the staging folder: `finish` closes it, and so does leaving.
        Raises OutputError, with needed and free bytes when the disk is full.
        """
        path = self.folder / layout.file_name
        with writing(path):
            for stale in (self.folder / (layout.file_name + _DONE), path):
                with suppress(FileNotFoundError):
                    os.unlink(stale)
            fd = create_part(path)
            self._open_shards.add(fd)
            try:
                reserve(fd, layout.size)
                write_all(fd, layout.header)
            except BaseException:
                self._discard(path, fd)
                raise
        return fd

    def finish(self, layout: ShardLayout, fd: int, record: Mapping[str, object]) -> None:
        """Flush, rename and record a shard whose bytes are all written; closes `fd`.

        The done record is {sha256, size} and what `record` adds; a "sha256" in `record` is taken
        as it is, else the file is read once more.
        """
        path = self.folder / layout.file_name
        with writing(path):
            try:
                os.fsync(fd)
                size = os.fstat(fd).st_size
                if size != layout.size:
                    raise OutputError(f"{path}: the file has {size} bytes, expected {layout.size}")
                full = {**record, "sha256": record.get("sha256") or hash_file(fd), "size": size}
            except BaseException:
                self._discard(path, fd)
                raise
            self._close(fd)
            os.rename(part_of(path), path)
            flush_folder(self.folder)
            write_file(self.folder / (layout.file_name + _DONE), _json_bytes(full))
            flush_folder(self.folder)
        self._records[layout.file_name] = full

    def publish(self, files: Mapping[str, bytes], manifest: Mapping[str, object]) -> None:
        """Write `files` (names without folders) and the manifest, and rename the folder to the output.

        The manifest gets two keys: "plan" (the digest) and "files", the size and sha256 of every
        file with what the done records hold. When an earlier run had written its manifest, that
        one stands, and only the rename is done.
        """
        if self._published is None:
            self._published = self._write_manifest(files, manifest)
        keep = {*self._published, MANIFEST_NAME}
        with writing(self.out):
            # The lock goes last, so that no second run moves in while files are being removed.
            for name in sorted(set(os.listdir(self.folder)) - keep, key=_lock_last):
                os.unlink(self.folder / name)
            flush_folder(self.folder)
            _refuse_existing(self.out)
            os.rename(self.folder, self.out)
            flush_folder(self.out.parent)
            with suppress(FileNotFoundError):  # of a second run that came between unlink and rename
                os.unlink(self.out / LOCK_NAME)

    def _write_manifest(
        self, files: Mapping[str, bytes], manifest: Mapping[str, object]
    ) -> dict[str, Record]:
        taken = {"", ".", "..", MANIFEST_NAME, PLAN_NAME, LOCK_NAME, *self._records}
        listed = dict(self._records)
        for name, data in files.items():
            if "/" in name or name in taken or name.endswith((PART, _DONE)):
                raise ValueError(f"{name!r} cannot be the name of a side file")
            with writing(self.folder / name):
                write_file(self.folder / name, data)
            listed[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        full = {**manifest, "plan": self._plan, "files": dict(sorted(listed.items()))}
        with writing(self.folder / MANIFEST_NAME):
            flush_folder(self.folder)
            write_file(self.folder / MANIFEST_NAME, _json_bytes(full))
            flush_folder(self.folder)
        return listed

    def _close(self, fd: int) -> None:
        self._open_shards.discard(fd)
        os.close(fd)

    def _discard(self, path: Path, fd: int) -> None:
        """Throw an unfinished shard away; what fails here the next run does."""
        with suppress(OSError):
            self._close(fd)
        with suppress(OSError):
            os.unlink(part_of(path))

    def _leave(self, *, remove: bool) -> None:
        """Close everything; on `remove` take the folder away, as if this run had never been."""
        for fd in tuple(self._open_shards):
            with suppress(OSError):
                self._close(fd)
        if remove:
            with suppress(OSError):
                for name in sorted(os.listdir(self.folder), key=_lock_last):
                    os.unlink(self.folder / name)
                os.rmdir(self.folder)
                for folder in reversed(self._made):
                    os.rmdir(folder)
        os.close(self._lock)


def _folder_of(out: Path) -> Path:
    return out.with_name(out.name + PARTIAL)


def _lock_last(name: str) -> tuple[bool, bool, str]:
    """Order of removal: a folder with a plan is ours, and nobody else's while the lock is there."""
    return name == LOCK_NAME, name == PLAN_NAME, name


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(f"{out}: the output exists already; remove it or choose another name")


def _refuse_foreign(folder: Path) -> None:
    """OutputError when something that no run of ours made stands where the staging folder goes."""
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    known = names & {PLAN_NAME, MANIFEST_NAME} or names <= {LOCK_NAME, PLAN_NAME + PART}
    if not known or os.path.islink(folder):
        raise OutputError(
            f"{folder}: the folder is in the way and is no unfinished run; remove it or choose another output"
        )


def _refuse_difference(folder: Path, found: Any, plan: Mapping[str, Any]) -> None:
    lines = differences(found, plan)
    if lines:
        raise OutputError(
            f"{folder}: the folder holds an unfinished run of another plan ({'; '.join(lines)}); remove it to"
            " start anew"
        )


def _take_lock(out: Path) -> int:
    """Make the staging folder and lock it; the descriptor holds the lock until it is closed."""
    folder = _folder_of(out)
    path = folder / LOCK_NAME
    for _ in range(_LOCK_ATTEMPTS):
        with suppress(FileExistsError):
            os.mkdir(folder)
            flush_folder(out.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another run published or removed the folder just now
        except OSError:
            with suppress(OSError):
                os.rmdir(folder)  # succeeds only when it is empty, so when it is ours
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(fd, path) and not os.path.lexists(out):
                with suppress(OSError):  # the text is for people; the lock holds without it
                    os.ftruncate(fd, 0)
                    write_all(fd, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
                return fd
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip()
            os.close(fd)
            raise OutputError(f"{out}: another run is writing it ({shown(holder)})") from None
        except BaseException:
            os.close(fd)
            raise
        _undo_late_lock(out, fd)
        _refuse_existing(out)
    raise OutputError(f"{folder}: the folder comes and goes; other runs use this output")


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _undo_late_lock(out: Path, fd: int) -> None:
    """Take back a lock file made while another run was publishing, wherever it lies now."""
    with suppress(OSError):
        for folder in (_folder_of(out), out):
            if _is_same(fd, folder / LOCK_NAME):
                os.unlink(folder / LOCK_NAME)
        os.rmdir(_folder_of(out))  # succeeds only when it is empty, so when it is ours
    os.close(fd)


def _read_own(path: Path) -> dict[str, Any] | None:
    """The object in a file of our own; None when there is no file."""
    try:
        return read_object(path)
    except CheckpointError as problem:
        raise _damaged(path, problem) from None


def _damaged(path: Path, problem: object) -> OutputError:
    detail = str(problem).removeprefix(f"{path}: ")
    return OutputError(f"{path}: the file is damaged ({detail}); remove the folder to start anew")


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("ascii")
