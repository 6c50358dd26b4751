"""Safetensors headers: read one from any file, hostile or not, and write one.

Promise of the reader: it accepts a subset of what the safetensors library accepts, with the same
meaning. Refused beyond the library: a name that stands twice, fields nobody knows, blanks before
the `{`, more than 64 dimensions, sizes of 2**63 and more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pymerge.dtypes import BY_HEADER_NAME, DType
from pymerge.errors import OutputError
from pymerge.files import LFS_MAGIC, LFS_POINTER, Malformed, read_exactly, reading
from pymerge.text import shown

MAX_HEADER_BYTES = 25_000_000  # huggingface_hub's own limit; hostile JSON costs up to 23 times its size
MAX_RANK = 64
DATA_ALIGNMENT = 64
METADATA_KEY = "__metadata__"

_DIGITS = bytes(ord("0") if chr(byte) in "0123456789" else ord(" ") for byte in range(256))
_FIELDS = {"dtype", "shape", "data_offsets"}
_FOREIGN = (
    ((LFS_MAGIC,), LFS_POINTER),
    (
        (b"PK\x03\x04",),
        "a zip archive as torch.save writes; pickled weights are refused, convert to safetensors",
    ),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which can run code when loaded and is refused; convert it to safetensors",
    ),
    ((b"GGUF",), "a GGUF file and not a safetensors file"),
    (
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"),
        "a web page and not a safetensors file; download it again",
    ),
    ((b'{"', b"{\n", b"{\r", b"{ "), "a JSON text and not a safetensors file"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `begin` and `end` are absolute byte offsets in that file."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


_Sizes: TypeAlias = "dict[tuple[str, tuple[int, ...]], tuple[DType, int]]"


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header: tensors in the order of their bytes; `digest` is the sha256 of length and JSON."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    digest: str
    file_size: int
    mtime_ns: int


class Described(NamedTuple):
    """What the bytes of a header say; `end`: where a file with this header ends."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    end: int


def read_header(
    path: Path, max_header_bytes: int = MAX_HEADER_BYTES, known: dict[str, Described] | None = None
) -> Header:
    """The checked header of one safetensors file.

    `known`: headers read before, by their digests; files with equal ones share what they say, and this one is
    added. Raises CheckpointError with one sentence naming the file, and the tensor where there is one.
    """
    with reading(path) as fd:
        status = os.fstat(fd)
        raw = _raw_header(fd, status.st_size, max_header_bytes)
        digest = hashlib.sha256(raw).hexdigest()
        said = known.get(digest) if known else None
        said = said or _parse(raw)
        _check_end(said.end, status.st_size)
    if known is not None:
        known[digest] = said
    return Header(said.tensors, said.metadata, digest, status.st_size, status.st_mtime_ns)


def _raw_header(fd: int, file_size: int, limit: int) -> bytes:
    """The 8 bytes of length and the JSON after them, as they stand in the file."""
    head = read_exactly(fd, min(file_size, 32), 0)
    length = int.from_bytes(head[:8], "little")
    problem = None
    if file_size < 8:
        problem = f"the file is too short for safetensors: {file_size} bytes, expected at least 10"
    elif length > limit:
        problem = f"the file claims a header of {length} bytes, allowed are at most {limit}"
    elif 8 + length > file_size:
        problem = f"the file is truncated: its header ends at byte {8 + length}, the file at {file_size}"
    elif length < 2 or head[8:9] != b"{":
        problem = "this is not a safetensors file: its header does not begin with {"
    if problem:
        # A true header that was cut short may begin with any length, so with any of the magic bytes.
        named = _FOREIGN if head[8:9] != b"{" else ()
        raise Malformed(next((f"this is {what}" for magic, what in named if head.startswith(magic)), problem))
    return read_exactly(fd, 8 + length, 0)


class _NotASize:
    """A number that can be no size (a fraction, negative, huge, NaN), kept as text for the message."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _size(text: str) -> int | _NotASize:
    # -0 is an integer to json but not to the reference.
    small = text[0] != "-" and len(text) <= 19 and int(text) < 1 << 63
    return int(text) if small else _NotASize(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"the JSON lists {shown(twice)} twice")
    return found


def _has_odd_number(raw: bytes) -> bool:
    """Whether a number may be no size; where none is, json's own fast integers do."""
    return b"-" in raw or b"0" * 19 in raw.translate(_DIGITS)  # no pattern: that takes longer than the JSON


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in strict UTF-8; Malformed on anything else and on names that stand twice.

    Integers of 2**63 and more, fractions and NaN come back as opaque objects, never as numbers.
    """
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_size if _has_odd_number(raw) else int,
            parse_float=_NotASize,
            parse_constant=_NotASize,
        )
    except UnicodeDecodeError as error:
        raise Malformed(f"the JSON is not UTF-8 at its byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"the JSON is malformed at its character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise Malformed("the JSON is not an object")
    return found


def _parse(raw: bytes) -> Described:
    top = parse_object(raw[8:])
    metadata = _metadata(top.pop(METADATA_KEY, None))
    if b"\\u" in raw:  # only an escape can smuggle in half a surrogate pair
        _refuse_surrogates([*top, *metadata, *metadata.values()])
    start = len(raw)
    # Few tensors have a shape of their own. To Python true is 1, so headers with flags are not trusted.
    sizes: _Sizes | None = None if b"true" in raw or b"false" in raw else {}
    entries = [(name, _entry(name, value, start, sizes)) for name, value in top.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    at = start
    for name, entry in entries:
        if entry.begin != at:
            what = "leaves a hole after" if entry.begin > at else "overlaps"
            raise Malformed(
                f"tensor {shown(name)} {what} the tensor before it:"
                f" it begins at byte {entry.begin - start} of the data, expected {at - start}"
            )
        at = entry.end
    return Described(dict(entries), metadata, at)


def _check_end(end: int, file_size: int) -> None:
    if file_size < end:
        raise Malformed(f"the file is truncated: its header describes {end} bytes, the file has {file_size}")
    if file_size > end:
        raise Malformed(
            f"the file goes on after its last tensor: its header describes {end} bytes,"
            f" the file has {file_size}"
        )


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise Malformed(f"{METADATA_KEY} is not a map from strings to strings")
    return value


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Malformed(f"the name or text {shown(text)} is not valid Unicode") from None


def _entry(name: str, value: Any, start: int, sizes: _Sizes | None) -> TensorEntry:
    """The entry that a header gives; `sizes`: bytes by type and shape of the sound ones so far."""
    if sizes is None:
        return _checked_entry(name, value, start)
    try:
        (begin, end), shape = value["data_offsets"], tuple(value["shape"])
        dtype, size = sizes[value["dtype"], shape]
        plain = type(value["shape"]) is list and type(begin) is type(end) is int and len(value) == 3
        if plain and end - begin == size:
            return TensorEntry(dtype, shape, start + begin, start + end)
    except (LookupError, TypeError, ValueError):
        pass  # the first of its shape, or wrong: then it is told below what is
    entry = _checked_entry(name, value, start)
    sizes[value["dtype"], entry.shape] = entry.dtype, entry.end - entry.begin
    return entry


def _checked_entry(name: str, value: Any, start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise Malformed(f"tensor {shown(name)} must have exactly the fields dtype, shape and data_offsets")
    header_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = BY_HEADER_NAME.get(header_name) if isinstance(header_name, str) else None
    if dtype is None:
        raise Malformed(f"tensor {shown(name)} has the unknown dtype {shown(header_name)}")
    if not _are_sizes(shape):
        raise Malformed(f"tensor {shown(name)} has the shape {shown(shape)}, which is not a list of sizes")
    if len(shape) > MAX_RANK:
        raise Malformed(f"tensor {shown(name)} has {len(shape)} dimensions, more than {MAX_RANK}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise Malformed(f"tensor {shown(name)} has the data_offsets {shown(offsets)}, expected two sizes")
    begin, end = offsets
    bits = _bits(name, shape, dtype)
    if bits % 8:
        raise Malformed(f"tensor {shown(name)} is {header_name} {shown(shape)}, which is not whole bytes")
    if end - begin != bits // 8:
        raise Malformed(
            f"tensor {shown(name)} has {end - begin} bytes by its data_offsets,"
            f" expected {bits // 8} for {header_name} {shown(shape)}"
        )
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python, not to JSON.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def _bits(name: str, shape: list[int], dtype: DType) -> int:
    count = 1
    for size in shape:  # left to right with the reference's overflow rule: [2**62, 4, 0] is an error
        count *= size
        if count >= 1 << 64:
            break
    if count * dtype.bits >= 1 << 64:
        raise Malformed(f"tensor {shown(name)} has the shape {shown(shape)}, more than 2**64 bits")
    return count * dtype.bits


def encode_header(
    entries: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data (length, JSON, blanks up to a multiple of 64) and where each tensor begins.

    `entries`: (name, dtype, shape), laid without gaps in the given order. Offsets are absolute bytes.
    Raises ValueError for a name given twice or a tensor that is not whole bytes, OutputError when
    the header would be too large for other readers.
    """
    table: dict[str, object] = {METADATA_KEY: dict(metadata)}
    begins: dict[str, int] = {}
    at = 0
    for name, dtype, shape in entries:
        size, rest = divmod(math.prod(shape) * dtype.bits, 8)
        if name in table or rest:
            raise ValueError(f"tensor {shown(name)} is listed twice or is not whole bytes")
        table[name] = {"dtype": dtype.header_name, "shape": list(shape), "data_offsets": [at, at + size]}
        begins[name] = at
        at += size
    if not metadata:
        del table[METADATA_KEY]
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"the header of one output shard takes {len(text)} bytes, more than the {MAX_HEADER_BYTES} that"
            " readers accept; choose a smaller maximum shard size"
        )
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}
