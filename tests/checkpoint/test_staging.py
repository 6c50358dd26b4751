"""The commit protocol inside one process: locks, resume, clean failure, publication."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commit_script import MANIFEST, NAMES, PLAN, SIDE_FILES, data_of, layout, run, write_shard

from pymerge.checkpoint.header import read_header
from pymerge.checkpoint.manifest import MANIFEST_NAME, PLAN_NAME
from pymerge.checkpoint.staging import LOCK_NAME, Staging
from pymerge.errors import CheckpointError, OutputError
from pymerge.files import hash_file

FIRST, SECOND = map(layout, NAMES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def folder_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(out: Path, *shards: str) -> None:
    """An earlier run that finished these shards and was then killed."""
    staging = Staging.open(out, PLAN)
    for name in shards:
        write_shard(staging, layout(name))
    staging._leave(remove=False)


def refused(out: Path, words: str, plan: object = PLAN) -> str:
    with pytest.raises(OutputError, match=words) as caught:
        Staging.open(out, plan)  # type: ignore[arg-type]
    assert str(out) in str(caught.value)
    return str(caught.value)


def test_whole_run(out: Path) -> None:
    run(out)
    assert not folder_of(out).exists()
    found = files(out)
    manifest = json.loads(found.pop(MANIFEST_NAME))
    assert set(found) == {*NAMES, *SIDE_FILES}
    assert {name: found[name] for name in SIDE_FILES} == SIDE_FILES
    for shard in (FIRST, SECOND):
        entries = read_header(out / shard.file_name).tensors
        for tensor in shard.tensors:
            at = entries[tensor.name]
            assert found[shard.file_name][at.begin : at.end] == data_of(tensor)
    hashes = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in found.items()}
    assert {name: (file["sha256"], file["size"]) for name, file in manifest["files"].items()} == hashes
    assert list(manifest["files"]) == sorted(found)
    assert manifest["files"][NAMES[0]]["tensors"] == 2
    assert manifest["plan"] == PLAN
    assert manifest["version"] == 1


def test_create_gives_a_reserved_file_with_its_header(out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        assert staging.folder == folder_of(out)
        assert staging.done(FIRST) is None
        fd = staging.create(FIRST)
        status = os.fstat(fd)
        assert status.st_size == FIRST.size
        assert status.st_blocks * 512 >= FIRST.size
        assert os.pread(fd, len(FIRST.header), 0) == FIRST.header
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert not os.get_inheritable(fd)
        assert set(os.listdir(staging.folder)) == {LOCK_NAME, PLAN_NAME, NAMES[0] + ".part"}


def test_finish_takes_a_known_hash_and_writes_the_record(out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        staging.finish(FIRST, staging.create(FIRST), {"sha256": "f" * 64, "nans": 0})
        record = {"sha256": "f" * 64, "nans": 0, "size": FIRST.size}
        assert json.loads((staging.folder / (NAMES[0] + ".done")).read_text()) == record
        assert staging.done(FIRST) == record


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused(kind: str, out: Path) -> None:
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("")
    else:
        out.symlink_to("gone")
    refused(out, "the output exists already")
    assert not folder_of(out).exists()


def test_second_run_exits_at_once_and_touches_nothing(out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        staging.create(FIRST)
        before = files(staging.folder)
        assert f"pid {os.getpid()} on " in refused(out, "another run is writing it")
        refused(out, "another run is writing it", {"recipe": "other"})
        assert files(staging.folder) == before


def test_a_left_lock_file_does_not_matter(out: Path) -> None:
    folder_of(out).mkdir()
    (folder_of(out) / LOCK_NAME).write_text("pid 1 on elsewhere, much longer than what is written now" * 3)
    with Staging.open(out, PLAN) as staging:
        assert (staging.folder / LOCK_NAME).read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


def test_resume_keeps_finished_shards_and_drops_the_rest(out: Path) -> None:
    start(out, *NAMES)
    (folder_of(out) / (NAMES[1] + ".done")).unlink()
    for name in ("x.safetensors.part", "config.json", "undecided.spill"):
        (folder_of(out) / name).write_bytes(b"junk")
    inode = (folder_of(out) / NAMES[0]).stat().st_ino
    with Staging.open(out, PLAN) as staging:
        kept = {LOCK_NAME, PLAN_NAME, NAMES[0], NAMES[0] + ".done"}
        assert set(os.listdir(staging.folder)) == kept
        assert (staging.done(FIRST) or {})["tensors"] == 2
        assert staging.done(SECOND) is None
    run(out)
    assert (out / NAMES[0]).stat().st_ino == inode
    assert not folder_of(out).exists()


def test_a_finished_shard_of_another_size_is_done_again(out: Path) -> None:
    start(out, NAMES[0])
    os.truncate(folder_of(out) / NAMES[0], 10)
    with Staging.open(out, PLAN) as staging:
        assert staging.done(FIRST) is None
        fd = staging.create(FIRST)
        assert set(os.listdir(staging.folder)) == {LOCK_NAME, PLAN_NAME, NAMES[0] + ".part"}
        staging.finish(FIRST, fd, {})
        assert staging.done(FIRST)
        assert staging.done(layout(NAMES[0], count=4999)) is None
        (staging.folder / (NAMES[0] + ".done")).write_text('{"size": 1}')
        assert staging.done(FIRST) is None


def test_another_plan_is_refused_with_the_difference(out: Path) -> None:
    start(out)
    other = {"recipe": "dare\n", "inputs": [PLAN["inputs"][0], {"path": "b", "size": 5}], "new": 1}
    message = refused(out, "unfinished run of another plan", other)
    assert "recipe line 1: was 'ties', now 'dare'; inputs[1].size: was 4, now 5" in message
    assert "new: was None, now 1" in message
    many = {**PLAN, "inputs": {str(i): i for i in range(9)}, **{str(i): i for i in range(9)}}
    assert "; and 5 more)" in refused(out, "another plan", many)
    assert set(os.listdir(folder_of(out))) == {LOCK_NAME, PLAN_NAME}
    run(out)


def test_a_damaged_plan_is_refused(out: Path) -> None:
    start(out)
    (folder_of(out) / PLAN_NAME).write_text("[")
    refused(out, "the file is damaged")


def test_plans_may_hold_any_json_and_odd_paths(out: Path) -> None:
    plan = {"tuple": (1, 2.5), "path": "ü\udcff", "none": None, "flag": True}
    Staging.open(out, plan).__exit__(None, None, None)
    Staging.open(out, plan).__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["files", "link", "file"])
def test_what_stands_in_the_way_is_refused_and_not_touched(kind: str, out: Path) -> None:
    if kind == "files":
        folder_of(out).mkdir()
        (folder_of(out) / "mine.txt").write_text("precious")
    elif kind == "link":
        (out.parent / "elsewhere").mkdir()
        folder_of(out).symlink_to("elsewhere")
    else:
        folder_of(out).write_text("precious")
    before = sorted(str(path) for path in out.parent.rglob("*"))
    refused(out, "in the way|Not a directory")
    assert sorted(str(path) for path in out.parent.rglob("*")) == before


def fail(out: Path, error: BaseException, *shards: str) -> None:
    def broken() -> None:
        with Staging.open(out, PLAN) as staging:
            for name in shards:
                write_shard(staging, layout(name))
            staging.create(SECOND)
            raise error

    with pytest.raises(type(error)):
        broken()


def test_bad_input_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "made" / "deep" / "out"
    fail(out, CheckpointError("truncated"))
    assert list(tmp_path.iterdir()) == []
    run(out)
    assert set(os.listdir(out.parent)) == {"out"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_other_failures_leave_a_folder_that_resumes(error: BaseException, out: Path) -> None:
    fail(out, error)
    assert set(os.listdir(folder_of(out))) == {LOCK_NAME, PLAN_NAME, NAMES[1] + ".part"}
    run(out)


def test_bad_input_after_a_finished_shard_leaves_the_folder(out: Path) -> None:
    fail(out, CheckpointError("truncated"), NAMES[0])
    fail(out, CheckpointError("truncated"))
    assert NAMES[0] in os.listdir(folder_of(out))
    run(out)


def test_a_shard_of_the_wrong_size_is_never_finished(out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        fd = staging.create(FIRST)
        os.ftruncate(fd, FIRST.size - 1)
        with pytest.raises(OutputError, match=f"has {FIRST.size - 1} bytes, expected {FIRST.size}"):
            staging.finish(FIRST, fd, {})
        assert set(os.listdir(staging.folder)) == {LOCK_NAME, PLAN_NAME}


def test_a_failed_flush_is_not_repeated_and_the_file_thrown_away(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    with Staging.open(out, PLAN) as staging:
        fd = staging.create(FIRST)
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="cannot be written: Input/output error") as caught:
            staging.finish(FIRST, fd, {})
        assert NAMES[0] in str(caught.value)
        assert calls == [fd]
        assert set(os.listdir(staging.folder)) == {LOCK_NAME, PLAN_NAME}
        monkeypatch.undo()
        write_shard(staging, FIRST)


def fake_fallocate(code: int) -> Callable[..., object]:
    class Library:
        def __init__(self, *args: object, **keys: object) -> None: ...

        class fallocate64:
            argtypes: tuple[object, ...] = ()

            def __new__(cls, *args: object) -> int:  # type: ignore[misc]
                ctypes.set_errno(code)
                return -1

    return Library


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_filesystems_without_fallocate(code: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", fake_fallocate(code))
    with Staging.open(out, PLAN) as staging:
        assert os.fstat(staging.create(FIRST)).st_size == FIRST.size


def test_libraries_without_fallocate(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **keys: object())
    with Staging.open(out, PLAN) as staging:
        assert os.fstat(staging.create(FIRST)).st_size == FIRST.size


def test_a_full_disk_is_told_with_needed_and_free_bytes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", fake_fallocate(errno.ENOSPC))
    words = rf"No space left on device, {FIRST.size} bytes are needed, \d+ bytes are free"
    with pytest.raises(OutputError, match=words), Staging.open(out, PLAN) as staging:
        staging.create(FIRST)
    assert not folder_of(out).exists()


def test_a_disk_larger_than_this(out: Path) -> None:
    huge = layout(NAMES[0])._replace(size=2**62)
    with (
        pytest.raises(OutputError, match=r"File too large|No space left"),
        Staging.open(out, PLAN) as staging,
    ):
        staging.create(huge)
    assert not folder_of(out).exists()


def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data)[:7], at))
    with Staging.open(out, PLAN) as staging:
        fd = staging.create(FIRST)
        assert os.pread(fd, len(FIRST.header), 0) == FIRST.header
        staging.finish(FIRST, fd, {})
    assert json.loads((folder_of(out) / PLAN_NAME).read_text()) == PLAN


def test_shards_from_several_threads(out: Path) -> None:
    shards = [layout(f"model-{i:05d}-of-00008.safetensors") for i in range(1, 9)]
    with Staging.open(out, PLAN) as staging, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda shard: write_shard(staging, shard), shards))
        staging.publish({}, MANIFEST)
    assert len(json.loads((out / MANIFEST_NAME).read_text())["files"]) == 8


@pytest.mark.parametrize(
    "name", ["a/b", "", "..", MANIFEST_NAME, PLAN_NAME, LOCK_NAME, NAMES[0], "x.part", "x.safetensors.done"]
)
def test_side_files_cannot_take_names_that_matter(name: str, out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        write_shard(staging, FIRST)
        with pytest.raises(ValueError, match="cannot be the name of a side file"):
            staging.publish({name: b""}, MANIFEST)
    assert not out.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(umask: int, mode: int, out: Path) -> None:
    old = os.umask(umask)
    try:
        run(out)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {mode}
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    "name", ["with blanks  and 'quotes'", "ünïcödé 😀", "n" * 240, "new\nline", "-rf", "\udcff"]
)
def test_odd_output_names(name: str, tmp_path: Path) -> None:
    run(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert len(os.listdir(tmp_path / name)) == 5


def test_names_that_cannot_be(tmp_path: Path) -> None:
    refused(tmp_path / ("n" * 250), "File name too long")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "out", "Not a directory")
    assert os.listdir(tmp_path) == ["file"]


def test_output_beside_a_link_and_by_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    run(Path("link/x/../out"))
    assert os.listdir(tmp_path / "real") == ["out"]


@pytest.mark.parametrize("size", [0, 3 * 2**20 + 17])
def test_hash_file(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        file.seek(5)
        assert hash_file(file.fileno()) == hashlib.sha256(data).hexdigest()
