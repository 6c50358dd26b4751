"""The strict header reader and the writer; the safetensors library is the oracle."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from handmade import entry, raw

from pymerge.checkpoint import header as header_module
from pymerge.checkpoint.header import TensorEntry, encode_header, read_header
from pymerge.dtypes import DType
from pymerge.errors import CheckpointError, OutputError

U8 = entry("U8", [2], 0, 2)
GOOD = {"a": U8}
U8_TEXT = json.dumps(U8)


def field(name: str, text: str) -> str:
    """A header with one tensor 'a' (U8 [2]) in which one field is replaced by JSON text."""
    fields = {"dtype": '"U8"', "shape": "[2]", "data_offsets": "[0,2]", name: text}
    return '{"a":{' + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}}"


# io.md's list of hostile files: name -> (bytes, words that the message must hold).
HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "too short"),
    "length 0": (raw("", length=0), "does not begin with {"),
    "length 2^64-1": (raw("{}", length=2**64 - 1), "claims a header of 18446744073709551615 bytes"),
    "length 2^63": (raw("{}", length=2**63), "claims a header"),
    "length over the limit": (raw("{}", length=25_000_001), "allowed are at most 25000000"),
    "length past the end": (raw("{}", length=100), "truncated: its header ends at byte 108, the file at 10"),
    "length one short": (raw(GOOD, b"ab", length=len(json.dumps(GOOD)) - 1), "malformed"),
    "length one long": (raw(GOOD, b"ab", length=len(json.dumps(GOOD)) + 1), "malformed"),
    "not UTF-8": (raw(b'{"\xff":' + U8_TEXT.encode() + b"}", b"ab"), "not UTF-8"),
    "byte order mark": (raw(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"ab"), "does not begin with {"),
    "UTF-16": (raw(json.dumps(GOOD).encode("utf-16-le"), b"ab"), "malformed"),
    "array": (raw("[]"), "does not begin with {"),
    "null": (raw("null"), "does not begin with {"),
    "junk after": (raw(json.dumps(GOOD) + "x", b"ab"), "malformed"),
    "two objects": (raw(json.dumps(GOOD) + "{}", b"ab"), "malformed"),
    "NUL padding": (raw(json.dumps(GOOD) + "\0\0", b"ab"), "malformed"),
    "leading blank": (raw(" " + json.dumps(GOOD), b"ab"), "does not begin with {"),
    "nested deeply": (raw('{"a":' + "[" * 200_000), "nested too deeply"),
    "tensor twice": (raw(f'{{"a":{U8_TEXT},"a":{U8_TEXT}}}', b"ab"), "lists 'a' twice"),
    "tensor twice, other dtype": (
        raw(f'{{"a":{U8_TEXT},"a":{U8_TEXT.replace("U8", "I8")}}}', b"ab"),
        "lists 'a' twice",
    ),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "lists '__metadata__' twice"),
    "metadata key twice": (raw('{"__metadata__":{"k":"1","k":"2"}}'), "lists 'k' twice"),
    "field twice": (raw('{"a":{"shape":[2],' + U8_TEXT[1:] + "}", b"ab"), "lists 'shape' twice"),
    "extra field": (raw(field("extra", "1"), b"ab"), "'a' must have exactly the fields"),
    "no dtype": (raw('{"a":{"shape":[2],"data_offsets":[0,2]}}', b"ab"), "'a' must have exactly"),
    "entry is a list": (raw('{"a":[]}'), "'a' must have exactly"),
    "metadata number": (raw('{"__metadata__":{"k":1}}'), "__metadata__ is not a map"),
    "metadata nested": (raw('{"__metadata__":{"k":{}}}'), "__metadata__ is not a map"),
    "metadata list": (raw('{"__metadata__":[]}'), "__metadata__ is not a map"),
    "metadata NaN": (raw('{"__metadata__":NaN}'), "__metadata__ is not a map"),
    "unknown dtype": (raw(field("dtype", '"F7"'), b"ab"), "'a' has the unknown dtype 'F7'"),
    "dtype in lower case": (raw(field("dtype", '"u8"'), b"ab"), "unknown dtype 'u8'"),
    "dtype is a list": (raw(field("dtype", '["U8"]'), b"ab"), "unknown dtype ['U8']"),
    "negative size": (raw(field("shape", "[-2]"), b"ab"), "'a' has the shape [-2], which is not"),
    "size 2.0": (raw(field("shape", "[2.0]"), b"ab"), "shape [2.0]"),
    "size 2e0": (raw(field("shape", "[2e0]"), b"ab"), "shape [2e0]"),
    "size true": (raw(field("shape", "[2,true]"), b"ab"), "shape [2, True]"),
    "size as text": (raw(field("shape", '["2"]'), b"ab"), "shape ['2']"),
    "size 02": (raw(field("shape", "[02]"), b"ab"), "malformed"),
    "size -0": (raw(field("shape", "[-0]").replace("[0,2]", "[0,0]")), "shape [-0]"),
    "size NaN": (raw(field("shape", "[NaN]"), b"ab"), "shape [NaN]"),
    "size 2^64": (raw(field("shape", f"[{2**64}]"), b"ab"), "which is not a list of sizes"),
    "size 10^400": (raw(field("shape", f"[1{'0' * 400}]"), b"ab"), "which is not a list of sizes"),
    "size of 5000 digits": (raw(field("shape", f"[1{'0' * 5000}]"), b"ab"), "which is not a list of sizes"),
    "product overflows": (raw(field("shape", f"[{2**40},{2**40}]"), b"ab"), "more than 2**64 bits"),
    "product wraps to 2": (raw(field("shape", f"[{2**63 - 1},2,2,2]"), b"ab"), "more than 2**64 bits"),
    "overflow before 0": (raw(field("shape", f"[{2**62},4,0]").replace("[0,2]", "[0,0]")), "more than 2**64"),
    "size 2^63 after 0": (
        raw(field("shape", f"[0,{2**63}]").replace("[0,2]", "[0,0]")),
        "not a list of sizes",
    ),
    "shape too large": (raw(field("shape", "[3]"), b"ab"), "'a' has 2 bytes by its data_offsets, expected 3"),
    "shape too small": (raw(field("shape", "[1]"), b"ab"), "'a' has 2 bytes by its data_offsets, expected 1"),
    "begin after end": (raw(field("data_offsets", "[2,0]"), b"ab"), "'a' has -2 bytes"),
    "negative offset": (raw(field("data_offsets", "[-2,0]"), b"ab"), "'a' has the data_offsets [-2, 0]"),
    "one offset": (raw(field("data_offsets", "[2]"), b"ab"), "'a' has the data_offsets [2]"),
    "three offsets": (raw(field("data_offsets", "[0,2,2]"), b"ab"), "'a' has the data_offsets [0, 2, 2]"),
    "hole in front": (raw({"a": entry("U8", [2], 1, 3)}, b"abc"), "'a' leaves a hole"),
    "hole inside": (raw({"a": U8, "b": entry("U8", [2], 3, 5)}, b"abcde"), "'b' leaves a hole"),
    "overlap": (raw({"a": U8, "b": entry("U8", [2], 1, 3)}, b"abc"), "'b' overlaps"),
    "same bytes twice": (raw({"a": U8, "b": U8}, b"ab"), "'b' overlaps"),
    "bytes after": (raw(GOOD, b"abc"), "goes on after its last tensor"),
    "one byte short": (raw(GOOD, b"a"), "truncated"),
    "huge tensor": (raw({"a": entry("U8", [2**40], 0, 2**40)}, b"x" * 92), "truncated"),
    "F4 half a byte": (raw({"a": entry("F4", [3], 0, 1)}, b"a"), "'a' is F4 [3], which is not whole bytes"),
    "F6 part of a byte": (raw({"a": entry("F6_E2M3", [1], 0, 1)}, b"a"), "not whole bytes"),
    "rank 10000": (raw({"a": entry("U8", [1] * 10_000, 0, 1)}, b"a"), "'a' has 10000 dimensions"),
    "rank 65": (raw({"a": entry("U8", [1] * 65, 0, 1)}, b"a"), "'a' has 65 dimensions, more than 64"),
    "half a surrogate pair": (raw(f'{{"\\ud800":{U8_TEXT}}}', b"ab"), "'\\ud800' is not valid Unicode"),
    "surrogate in metadata": (raw('{"__metadata__":{"k":"\\udc00"}}'), "not valid Unicode"),
    "control character in a name": (raw('{"a\\u001b[31m\\n":{}}'), "tensor 'a\\x1b[31m\\n' must"),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n",
        "this is a git-LFS pointer",
    ),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "this is a zip archive as torch.save writes"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.", "this is a pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 60, "this is a GGUF file"),
    "web page": (b"<!DOCTYPE html><html></html>", "this is a web page"),
    "JSON": (b'{"weight_map": {}, "metadata": {}}', "this is a JSON text"),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = write(tmp_path / "model.safetensors", data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("U8", "", [3, 4]),
        ("U8", {}, [3, 4]),
        ("U8", [True, 2], [3, 5]),
        ("U8", [2, True], [3, 5]),
        ("U8", [1, 2], [3, 6]),
        ("U8", [1, 2], [3]),
        ("U8", [1, 2], [[3], 5]),
        ("U8", [1, 2], {"3": 0, "5": 0}),
        ("U9", [1, 2], [3, 5]),
        (["U8"], [1, 2], [3, 5]),
    ],
)
def test_a_tensor_like_one_before_is_checked_as_well(
    dtype: object, shape: object, offsets: object, tmp_path: Path
) -> None:
    before = {"s": entry("U8", [], 0, 1), "m": entry("U8", [1, 2], 1, 3)}
    wrong = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    refuse(write(tmp_path / "x", raw({**before, "w": wrong}, b"abcdef")), "tensor 'w'")
    more = {"dtype": "U8", "shape": [1, 2], "data_offsets": [3, 5], "more": 1}
    refuse(write(tmp_path / "y", raw({**before, "w": more}, b"abcde")), "tensor 'w'")


def test_good_file_is_read_whole(tmp_path: Path) -> None:
    table = {
        "__metadata__": {"format": "pt"},
        "late": entry("F32", [2, 1], 3, 11),
        "early": entry("U8", [3], 0, 3),
    }
    data = raw(json.dumps(table) + "  ", b"abc" + struct.pack("<2f", 1, 2))
    path = write(tmp_path / "x.safetensors", data)
    header = read_header(path)
    start = len(data) - 11
    assert header.tensors == {
        "early": TensorEntry(DType.U8, (3,), start, start + 3),
        "late": TensorEntry(DType.F32, (2, 1), start + 3, start + 11),
    }
    assert list(header.tensors) == ["early", "late"]
    assert [tensor.count for tensor in header.tensors.values()] == [3, 2]
    assert header.metadata == {"format": "pt"}
    assert header.digest == hashlib.sha256(data[:start]).hexdigest()
    assert header.file_size == len(data)
    assert header.mtime_ns == path.stat().st_mtime_ns


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({}, 0),
        ({"__metadata__": None}, 0),
        ({"": U8}, 2),
        ({"a\0b": U8}, 2),
        ({"../../x": U8}, 2),
        ({"n" * 1_000_000: U8}, 2),
        ({"\U0001f600": U8}, 2),
        ({"scalar": entry("F32", [], 0, 4)}, 4),
        ({"empty": entry("F32", [0, 5], 0, 0), "b": U8}, 2),
        ({"b": U8, "empty, at the same place": entry("F32", [0], 0, 0)}, 2),
        ({"odd": entry("U8", [1], 0, 1), "unaligned": entry("F32", [1], 1, 5)}, 5),
        ({"four bits": entry("F4", [4], 0, 2)}, 2),
        ({"a": entry("U8", [1] * 63 + [2], 0, 2)}, 2),
    ],
)
def test_unusual_but_legal(table: dict[str, Any], size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", raw(table, b"\xff" * size))
    names = {name for name in table if name != "__metadata__"}
    assert set(read_header(path).tensors) == names
    with safetensors.safe_open(path, "np") as opened:
        assert set(opened.keys()) == names


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", raw({"n" * 100_000: entry("F7", [2], 0, 2)}, b"ab"))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_header_limit_can_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", raw(GOOD, b"ab"))
    with pytest.raises(CheckpointError, match="allowed are at most 10"):
        read_header(path, max_header_bytes=10)


def refuse(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    refuse(fifo, "not a regular file")
    refuse(tmp_path, "not a regular file")
    refuse(Path("/dev/zero"), "not a regular file")
    refuse(tmp_path / "none.safetensors", "does not exist")
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "gone")
    refuse(dangling, "the symbolic link leads to no file")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    refuse(loop, "cannot be opened")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_header(Path("a\0b"))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", raw(GOOD, b"ab"))
    bad = write(tmp_path / "bad.safetensors", b"")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_header(good)
        with pytest.raises(CheckpointError):
            read_header(bad)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("shape", [[4, 128], [0]])
def test_many_tensors_are_read_in_bounded_time(shape: list[int], tmp_path: Path) -> None:
    count = 20_000
    size = 2 * int(np.prod(shape))
    table = {
        f"model.layers.{i}.mlp.experts.{i}.down_proj.weight": entry("BF16", shape, i * size, i * size + size)
        for i in range(count)
    }
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(raw(table))
        file.truncate(file.tell() + count * size)
    start = time.process_time()
    header = read_header(path)
    spent = time.process_time() - start
    assert len(header.tensors) == count
    assert spent < 1.5  # a quarter of a second when the machine is idle


def test_hostile_json_in_bounded_time(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", raw('{"a":[' + "[]," * 1_000_000 + "[]]}"))
    start = time.process_time()
    refuse(path, "'a' must have exactly")
    assert time.process_time() - start < 5


# The writer.

SHAPES = {DType.F4: (3, 2), DType.F6_E2M3: (4,), DType.F6_E3M2: (2, 4), DType.F32: (), DType.I64: (0, 7)}


def test_encoded_header_holds_every_dtype(tmp_path: Path) -> None:
    entries = [(f"t\n{dtype.header_name}", dtype, SHAPES.get(dtype, (3, 5))) for dtype in DType]
    text, begins = encode_header(entries, {"format": "pt"})
    assert len(text) % 64 == 0
    ends = [begins[name] + int(np.prod(shape)) * dtype.bits // 8 for name, dtype, shape in entries]
    assert list(begins.values()) == [len(text), *ends[:-1]]
    path = write(tmp_path / "x.safetensors", text + bytes(ends[-1] - len(text)))
    read = read_header(path)
    assert read.metadata == {"format": "pt"}
    for (name, dtype, shape), end in zip(entries, ends, strict=True):
        assert read.tensors[name] == TensorEntry(dtype, shape, begins[name], end)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, dtype, shape in entries:
            assert opened.get_slice(name).get_dtype() == dtype.header_name
            assert tuple(opened.get_slice(name).get_shape()) == shape


def test_the_library_reads_the_values_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "w": rng.normal(size=(3, 4)).astype(np.float32),
        "äöü 😀": np.arange(5, dtype=np.int16),
    }
    text, _ = encode_header([("w", DType.F32, (3, 4)), ("äöü 😀", DType.I16, (5,))], {})
    path = write(tmp_path / "x.safetensors", text + b"".join(array.tobytes() for array in arrays.values()))
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_the_library_written_file_is_read(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.uint8),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    data = path.read_bytes()
    for name, found in read_header(path).tensors.items():
        assert data[found.begin : found.end] == arrays[name].tobytes()
        assert found.shape == arrays[name].shape


def test_encode_refuses_what_cannot_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'a' is listed twice"):
        encode_header([("a", DType.U8, (1,)), ("a", DType.U8, (1,))], {})
    with pytest.raises(ValueError, match="__metadata__"):
        encode_header([("__metadata__", DType.U8, (1,))], {})
    with pytest.raises(ValueError, match="not whole bytes"):
        encode_header([("a", DType.F4, (1,))], {})
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 100)
    with pytest.raises(OutputError, match="choose a smaller maximum shard size"):
        encode_header([("a" * 100, DType.U8, (1,))], {})


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x0280, 0x0480, 0x4B50])
def test_a_cut_file_is_not_mistaken_for_something_else(length: int, tmp_path: Path) -> None:
    """Its first byte is the header's length, so may be that of a pickle or of a web page."""
    path = write(tmp_path / "x.safetensors", raw(json.dumps(GOOD), length=length)[:40])
    refuse(path, "truncated")
