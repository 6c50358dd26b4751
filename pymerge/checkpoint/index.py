"""A checkpoint on disk: one safetensors file, or a folder of shards with or without an index."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pymerge.checkpoint.header import (
    MAX_HEADER_BYTES,
    Described,
    Header,
    TensorEntry,
    parse_object,
    read_header,
)
from pymerge.errors import CheckpointError, ProblemList
from pymerge.files import Malformed, is_file_name, read_file
from pymerge.text import shown

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NUMBER = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
_SHOWN_AT_MOST = 10


class Shard(NamedTuple):
    """One safetensors file of a checkpoint."""

    path: Path
    header: Header


class TensorRef(NamedTuple):
    """Where a tensor lies: the number of its shard and its entry there."""

    shard: int
    entry: TensorEntry


class Checkpoint(NamedTuple):
    """All headers of one checkpoint. `tensors` is in the order of the bytes, shard after shard."""

    path: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorRef]


class Seen(NamedTuple):
    """What the checkpoints opened before hold: those of a family often have equal headers, and share it.

    `headers`, `indexes`: by the digests of their bytes. `tensors`: by the digests of the shards' headers.
    """

    headers: dict[str, Described]
    indexes: dict[str, dict[str, str]]
    tensors: dict[tuple[str, ...], dict[str, TensorRef]]

    @classmethod
    def nothing(cls) -> Seen:
        """Where the first checkpoint begins."""
        return cls({}, {}, {})


def open_checkpoint(path: Path, seen: Seen | None = None) -> Checkpoint:
    """Read every header of the checkpoint at `path`, a folder or one safetensors file.

    `seen`: what is shared with checkpoints opened before; of this one it is added. Then nobody may change
    the tables. Raises CheckpointError for one problem and ProblemList for several found together; each is
    one sentence naming file and tensor. Reads no tensor data. Files may be symbolic links.
    """
    seen = seen or Seen.nothing()
    if not _is_folder(path):
        return _checkpoint(path, [Shard(path, read_header(path, known=seen.headers))], seen)
    weights = _weights_of(path)
    if weights.name.endswith(_INDEX_SUFFIX):
        return _checkpoint(path, _indexed_shards(path, weights, seen), seen)
    return _checkpoint(path, [Shard(weights, read_header(weights, known=seen.headers))], seen)


def _checkpoint(path: Path, shards: Sequence[Shard], seen: Seen) -> Checkpoint:
    key = tuple(shard.header.digest for shard in shards)
    tensors = seen.tensors.get(key)
    if tensors is None:
        tensors = seen.tensors[key] = {
            name: TensorRef(number, entry)
            for number, shard in enumerate(shards)
            for name, entry in shard.header.tensors.items()
        }
    return Checkpoint(path, tuple(shards), tensors)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such folder or file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: the folder cannot be opened: {reason}") from None


def _weights_of(folder: Path) -> Path:
    """The index or the one file that holds the folder's weights."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be read: {error.strerror}") from None
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(_SUFFIX)]
    if INDEX_NAME in indexes:
        return folder / INDEX_NAME
    if SINGLE_NAME in files and not indexes:
        return folder / SINGLE_NAME
    if SINGLE_NAME in files or len(indexes) > 1:
        rivals = [name for name in files if name == SINGLE_NAME] + indexes
        raise CheckpointError(_ambiguous(folder, rivals))
    if indexes:
        return folder / indexes[0]
    return folder / _only_file(folder, files, names)


def _ambiguous(folder: Path, names: Sequence[str]) -> str:
    return (
        f"{folder}: the folder is ambiguous, it holds {' and '.join(map(shown, names))};"
        " remove all but one or name the file"
    )


def _only_file(folder: Path, files: Sequence[str], names: Sequence[str]) -> str:
    where = folder
    number = _SHARD_NUMBER.search(files[0]) if files else None
    if len(files) > 1 or (number and int(number[2]) != 1):
        listed = ", ".join(map(shown, files[:3])) + (", ..." if len(files) > 3 else "")
        what, hint = ("shards", "") if number else ("files", "; where each is a model, name one")
        raise CheckpointError(f"{where}: the folder holds {what} ({listed}) but no {INDEX_NAME}{hint}")
    if files:
        return files[0]
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{where}: the folder holds only pickled weights ({shown(pickles[0])}), which can run code when"
            " loaded and are refused; convert them to safetensors, for example with transformers'"
            " save_pretrained"
        )
    parts = [name for name in names if _has_weights(folder / name)]
    if parts:
        listed = ", ".join(map(shown, parts[:3])) + (", ..." if len(parts) > 3 else "")
        raise CheckpointError(
            f"{where}: the folder holds no safetensors file, its folders do ({listed}), as the parts of a"
            f" pipeline; name one of them, such as {folder / parts[0]}, and merge each by a recipe of its own"
        )
    raise CheckpointError(f"{where}: the folder holds no safetensors file")


def _has_weights(folder: Path) -> bool:
    try:
        return any(name.endswith(_SUFFIX) for name in os.listdir(folder))
    except OSError:  # no folder, or none that can be read
        return False


def _indexed_shards(folder: Path, index: Path, seen: Seen) -> list[Shard]:
    weight_map = _read_index(index, seen)
    file_names = sorted(set(weight_map.values()))
    problems = [
        f"{index}: {shown(name)} is not the plain name of a {_SUFFIX} file in the same folder"
        for name in file_names
        if not _is_plain(name)
    ]
    if SINGLE_NAME not in file_names and os.path.lexists(folder / SINGLE_NAME):
        problems.append(_ambiguous(folder, [SINGLE_NAME, index.name]))
    if problems:  # nothing is opened by a name that should not be trusted
        _refuse(problems)
    headers: dict[str, Header] = {}
    for name in file_names:
        if not os.path.lexists(folder / name):
            problems.append(f"{folder / name}: this shard is missing, {shown(index.name)} names it")
            continue
        try:
            headers[name] = read_header(folder / name, known=seen.headers)
        except CheckpointError as problem:
            problems.append(str(problem))
    problems += _disagreements(folder, index, weight_map, headers)
    if problems:
        _refuse(problems)
    return [Shard(folder / name, headers[name]) for name in file_names]


def _refuse(problems: Sequence[str]) -> None:
    raise CheckpointError(problems[0]) if len(problems) == 1 else ProblemList(problems)


def _read_index(path: Path, seen: Seen) -> dict[str, str]:
    """The checked weight_map: tensor name to file name."""
    data = read_file(path, MAX_HEADER_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if digest in seen.indexes:
        return seen.indexes[digest]
    try:
        weight_map = parse_object(data).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Malformed("the index has no weight_map that lists tensors")
        for tensor, file_name in weight_map.items():
            if not isinstance(file_name, str):
                raise Malformed(f"the index gives tensor {shown(tensor)} no file name")
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    seen.indexes[digest] = weight_map
    return weight_map


def _is_plain(name: str) -> bool:
    """One path component on every system, that ends in .safetensors."""
    return is_file_name(name) and name.endswith(_SUFFIX) and name != _SUFFIX and not set(name) & set("\\:")


def _disagreements(
    folder: Path, index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]
) -> list[str]:
    """One sentence for each tensor about which the index and the shards that could be read disagree."""
    lying = {tensor: file_name for file_name, header in headers.items() for tensor in header.tensors}
    if lying == weight_map and len(lying) == sum(len(header.tensors) for header in headers.values()):
        return []
    places: dict[str, list[str]] = {}
    for file_name, header in headers.items():
        for tensor in header.tensors:
            places.setdefault(tensor, []).append(file_name)
    twice, unlisted, elsewhere, absent = [], [], [], []
    for tensor, found in places.items():
        listed = weight_map.get(tensor)
        if len(found) > 1:
            files = " and ".join(map(shown, found))
            twice.append(f"{folder}: tensor {shown(tensor)} lies in {files}, expected one file")
        elif listed is None:
            where = folder / found[0]
            unlisted.append(f"{where}: tensor {shown(tensor)} is in the file but not in {shown(index.name)}")
        elif listed != found[0]:
            where = index
            elsewhere.append(
                f"{where}: tensor {shown(tensor)} is listed in {shown(listed)} but lies in {shown(found[0])}"
            )
    for tensor, listed in weight_map.items():
        if listed in headers and tensor not in places:
            where = folder / listed
            absent.append(f"{where}: tensor {shown(tensor)} is in {shown(index.name)} but not in the file")
    return [line for kind in (twice, unlisted, elsewhere, absent) for line in _shortened(kind)]


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN_AT_MOST
    return lines if more <= 1 else [*lines[:_SHOWN_AT_MOST], f"... and {more} more tensors like the last one"]
