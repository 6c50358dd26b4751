"""The last step of the commit protocol, and second runs that come at the worst moment."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from commit_script import MANIFEST, NAMES, PLAN, SIDE_FILES, layout, run, write_shard

from pymerge.checkpoint.manifest import MANIFEST_NAME, PLAN_NAME
from pymerge.checkpoint.staging import Staging
from pymerge.errors import OutputError

FIRST, SECOND = map(layout, NAMES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def folder_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_manifest_means_that_only_the_rename_is_left(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the clean-up before the rename had been done."""
    run(out)
    expected = files(out)
    shutil.rmtree(out)

    def no_rename(source: Path, target: Path) -> None:
        if target == out:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    real = os.rename
    monkeypatch.setattr(os, "rename", no_rename)
    with pytest.raises(OutputError, match="Input/output error"):
        run(out)
    monkeypatch.undo()
    assert set(os.listdir(folder_of(out))) == set(expected)
    with pytest.raises(OutputError, match="another plan"):
        Staging.open(out, {"recipe": "other"})
    for name in (PLAN_NAME, NAMES[0] + ".done", "stray"):
        (folder_of(out) / name).write_text("{}")
    with Staging.open(out, PLAN) as staging:
        assert (staging.done(FIRST) or {})["tensors"] == 2
        assert staging.done(SECOND)
        staging.publish({"config.json": b"other"}, {"version": 2})
    assert files(out) == expected


def test_a_changed_file_under_a_manifest_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out)
    os.rename(out, folder_of(out))
    os.truncate(folder_of(out) / NAMES[0], 3)
    with pytest.raises(OutputError, match="the finished file was changed, it has 3 bytes"):
        run(out)
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"files": []}',
        '{"files": {"x": {}}}',
        '{"files": {"x": {"size": 1, "sha256": "", "undecided": []}}}',
        '{"files": {"../x": {"size": 1, "sha256": ""}}}',
        '{"files": {"\\ud800": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_manifest_of_another_shape_is_refused(text: str, out: Path) -> None:
    folder_of(out).mkdir()
    (folder_of(out) / MANIFEST_NAME).write_text(text)
    with pytest.raises(OutputError, match=r"the file is damaged .* remove the folder to start anew"):
        Staging.open(out, PLAN)
    assert (folder_of(out) / MANIFEST_NAME).exists()


def test_a_manifest_without_a_plan_is_of_another_plan(out: Path) -> None:
    folder_of(out).mkdir()
    (folder_of(out) / MANIFEST_NAME).write_text('{"files": {}}')
    with pytest.raises(OutputError, match="holds an unfinished run of another plan"):
        Staging.open(out, PLAN)


def test_an_output_that_appears_meanwhile_is_not_replaced(out: Path) -> None:
    with Staging.open(out, PLAN) as staging:
        write_shard(staging, FIRST)
        out.mkdir()
        with pytest.raises(OutputError, match="exists already"):
            staging.publish(SIDE_FILES, MANIFEST)
    assert os.listdir(out) == []
    out.rmdir()
    with Staging.open(out, PLAN) as staging:
        assert staging.done(FIRST)
        staging.publish(SIDE_FILES, MANIFEST)
    assert set(os.listdir(out)) == {NAMES[0], *SIDE_FILES, MANIFEST_NAME}


def test_second_run_that_waits_at_the_lock_while_the_first_publishes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Staging.open(out, PLAN)
    real = fcntl.flock

    def late(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        with first:
            first.publish(SIDE_FILES, MANIFEST)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="exists already"):
        Staging.open(out, PLAN)
    assert os.listdir(out.parent) == ["out"]
    assert set(os.listdir(out)) == {*SIDE_FILES, MANIFEST_NAME}


def test_second_run_that_comes_just_before_the_last_rename(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = []
    real = os.rename

    def late(source: Path, target: Path) -> None:
        if target == out:
            second.append(Staging.open(out, PLAN))
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    with Staging.open(out, PLAN) as first:
        first.publish(SIDE_FILES, MANIFEST)
    monkeypatch.undo()
    assert set(os.listdir(out)) == {*SIDE_FILES, MANIFEST_NAME}
    with pytest.raises(OutputError), second[0] as staging:
        staging.publish(SIDE_FILES, MANIFEST)
    assert os.listdir(out.parent) == ["out"]
    assert set(os.listdir(out)) == {*SIDE_FILES, MANIFEST_NAME}
