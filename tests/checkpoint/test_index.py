"""Opening folders: which files count, and every disagreement of index and shards at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from handmade import raw, write_index, write_tensors

from pymerge.checkpoint.index import Checkpoint, Seen, TensorRef, open_checkpoint
from pymerge.errors import CheckpointError, ProblemList

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder: a, b in the first shard, c in the second."""
    write_tensors(tmp_path / FIRST, ["a", "b"])
    write_tensors(tmp_path / SECOND, ["c"])
    write_index(tmp_path, {"c": SECOND, "a": FIRST, "b": FIRST})
    return tmp_path


def problem(path: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    return str(caught.value)


def files_of(checkpoint: Checkpoint) -> list[str]:
    return [shard.path.name for shard in checkpoint.shards]


def test_sharded_folder(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    assert found.path == sharded
    assert [shard.path for shard in found.shards] == [sharded / FIRST, sharded / SECOND]
    assert list(found.tensors) == ["a", "b", "c"]
    assert found.tensors["c"] == TensorRef(1, found.shards[1].header.tensors["c"])


def test_single_file_by_folder_and_by_path(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "model.safetensors", ["a"])
    write_tensors(tmp_path / "adapter_model.safetensors", ["other"])
    assert files_of(open_checkpoint(tmp_path)) == ["model.safetensors"]
    by_path = open_checkpoint(path)
    assert by_path.path == by_path.shards[0].path == path
    assert list(by_path.tensors) == ["a"]


def test_files_may_be_symbolic_links_out_of_the_folder(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    for name in (FIRST, SECOND, INDEX):
        os.rename(sharded / name, blobs / name.replace(".", "_"))
        (sharded / name).symlink_to(os.path.relpath(blobs / name.replace(".", "_"), sharded))
    assert list(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_one_other_file_is_taken(tmp_path: Path) -> None:
    write_tensors(tmp_path / "adapter_model.safetensors", ["a"])
    assert files_of(open_checkpoint(tmp_path)) == ["adapter_model.safetensors"]


def test_one_other_index_is_taken(sharded: Path) -> None:
    os.rename(sharded / INDEX, sharded / "model.fp16.safetensors.index.json")
    assert files_of(open_checkpoint(sharded)) == [FIRST, SECOND]


def test_the_usual_index_goes_before_others_and_before_unlisted_files(sharded: Path) -> None:
    write_index(sharded, {"a": "none.safetensors"}, "model.fp16.safetensors.index.json")
    write_tensors(sharded / "consolidated.safetensors", ["a"])
    assert files_of(open_checkpoint(sharded)) == [FIRST, SECOND]


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", ["a"])
    write_index(tmp_path, {"a": "model.safetensors"})
    assert files_of(open_checkpoint(tmp_path)) == ["model.safetensors"]


def test_ambiguous_folders_are_refused_by_naming_both(sharded: Path) -> None:
    write_tensors(sharded / "model.safetensors", ["a", "b", "c"])
    message = problem(sharded)
    assert "ambiguous" in message
    assert "'model.safetensors' and 'model.safetensors.index.json'" in message
    os.rename(sharded / INDEX, sharded / "other.safetensors.index.json")
    assert "'model.safetensors' and 'other.safetensors.index.json'" in problem(sharded)
    (sharded / "model.safetensors").unlink()
    write_index(sharded, {}, "third.safetensors.index.json")
    assert "'other.safetensors.index.json' and 'third.safetensors.index.json'" in problem(sharded)


@pytest.mark.parametrize("names", [[FIRST, SECOND], [FIRST], ["a.safetensors", "b.safetensors"]])
def test_shards_without_index_are_refused(names: list[str], tmp_path: Path) -> None:
    for name in names:
        write_tensors(tmp_path / name, [name])
    message = problem(tmp_path)
    assert f"but no {INDEX}" in message
    assert all(repr(name) in message for name in names)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_of_pickles_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    message = problem(tmp_path)
    assert repr(name) in message
    assert "convert them to safetensors" in message


def test_no_weights_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no safetensors file" in problem(tmp_path)
    assert problem(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder or file"
    assert "cannot be opened" in problem(Path("a\0b"))
    assert "cannot be opened" in problem(tmp_path / "config.json" / "x")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "a/../../b.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "x.bin",
        "x\0.safetensors",
        ".",
        "..",
        "",
        ".safetensors",
        "\ud800.safetensors",
    ],
)
def test_shard_names_that_are_no_plain_file_names(name: str, sharded: Path) -> None:
    write_index(sharded, {"a": name, "b": FIRST})
    message = problem(sharded)
    assert message.startswith(f"{sharded / INDEX}: ")
    assert "is not the plain name of a .safetensors file" in message
    assert message.isprintable()


def test_all_bad_names_at_once_and_nothing_opened(sharded: Path) -> None:
    write_index(sharded, {"a": "../x.safetensors", "b": "/y.safetensors", "c": "gone.safetensors"})
    assert problem(sharded, ProblemList).count("is not the plain name") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "lists 'a' twice"),
        ('{"weight_map": {}, "weight_map": {}}', "lists 'weight_map' twice"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "gives tensor 'a' no file name"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', "gives tensor 'a' no file name"),
        ("[]", "not an object"),
        ("", "malformed"),
        ("{", "malformed"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_index(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    message = problem(tmp_path)
    assert message.startswith(f"{tmp_path / INDEX}: ")
    assert words in message


def test_index_that_is_no_file_or_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / INDEX)
    assert "not a regular file" in problem(tmp_path)
    (tmp_path / INDEX).unlink()
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(25_000_001)
    assert "allowed are at most 25,000,000" in problem(tmp_path)


def test_one_missing_shard_is_one_error(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert problem(sharded) == f"{sharded / SECOND}: this shard is missing, '{INDEX}' names it"


def test_dangling_link_and_bad_header_name_the_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("gone")
    (sharded / FIRST).write_bytes(raw({}, b"xx"))
    assert problem(sharded, ProblemList).splitlines() == [
        f"{sharded / FIRST}: the file goes on after its last tensor:"
        " its header describes 10 bytes, the file has 12",
        f"{sharded / SECOND}: the symbolic link leads to no file",
    ]


def test_everything_is_reported_together(sharded: Path) -> None:
    write_tensors(sharded / FIRST, ["a", "b", "extra", "twice"])
    write_tensors(sharded / SECOND, ["c", "twice", "moved"])
    third, fourth = "model-3.safetensors", "model-4.safetensors"
    (sharded / fourth).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    write_index(
        sharded,
        {
            "a": FIRST,
            "b": FIRST,
            "c": SECOND,
            "twice": FIRST,
            "moved": FIRST,
            "absent": SECOND,
            "x": third,
            "y": fourth,
        },
    )
    with pytest.raises(ProblemList) as caught:
        open_checkpoint(sharded)
    index = sharded / INDEX
    assert caught.value.problems == (
        f"{sharded / third}: this shard is missing, '{INDEX}' names it",
        f"{sharded / fourth}: this is a git-LFS pointer and not the file itself;"
        " fetch it with `git lfs pull`",
        f"{sharded}: tensor 'twice' lies in '{FIRST}' and '{SECOND}', expected one file",
        f"{sharded / FIRST}: tensor 'extra' is in the file but not in '{INDEX}'",
        f"{index}: tensor 'moved' is listed in '{FIRST}' but lies in '{SECOND}'",
        f"{sharded / SECOND}: tensor 'absent' is in '{INDEX}' but not in the file",
    )


def test_a_wrong_file_does_not_flood_the_screen(sharded: Path) -> None:
    write_tensors(sharded / SECOND, [f"t{i}" for i in range(1000)])
    lines = problem(sharded, ProblemList).splitlines()
    assert len(lines) == 12
    assert lines[10] == "... and 990 more tensors like the last one"


def test_large_index(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.weight" for i in range(36_000)]
    weight_map: dict[str, str] = {}
    for number in range(4):
        part = names[number::4]
        write_tensors(tmp_path / f"m{number}.safetensors", part)
        weight_map |= {name: f"m{number}.safetensors" for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert set(open_checkpoint(tmp_path).tensors) == set(names)


def test_equal_headers_are_shared_and_every_file_is_checked_all_the_same(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twin = tmp_path_factory.mktemp("twin")
    write_tensors(twin / FIRST, ["a", "b"], fill=1)
    write_tensors(twin / SECOND, ["c"], fill=1)
    (twin / INDEX).write_bytes((sharded / INDEX).read_bytes())
    seen = Seen.nothing()
    first, second = open_checkpoint(sharded, seen), open_checkpoint(twin, seen)
    assert second.tensors is first.tensors
    assert second == open_checkpoint(twin)
    with open(twin / SECOND, "ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=rf"{SECOND}: the file goes on after its last tensor"):
        open_checkpoint(twin, seen)
    os.truncate(twin / SECOND, os.path.getsize(sharded / SECOND) - 1)
    with pytest.raises(CheckpointError, match=rf"{SECOND}: the file is truncated"):
        open_checkpoint(twin, seen)


def test_an_index_seen_before_is_compared_with_other_shards(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_tensors(other / FIRST, ["a"])
    write_tensors(other / SECOND, ["c"])
    (other / INDEX).write_bytes((sharded / INDEX).read_bytes())
    seen = Seen.nothing()
    open_checkpoint(sharded, seen)
    with pytest.raises(CheckpointError, match=r"tensor 'b' is in .* but not in the file"):
        open_checkpoint(other, seen)
