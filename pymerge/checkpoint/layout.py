"""How the output is cut into files: names, headers, offsets and the index, before a byte is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from pymerge.checkpoint.header import encode_header
from pymerge.dtypes import DType
from pymerge.errors import PymergeError
from pymerge.text import shown

STEM = "model"
DIFFUSERS_STEM = "diffusion_pytorch_model"  # the only weights that diffusers' models look for
METADATA = {"format": "pt"}  # transformers refuses files without it

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutputTensor(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.bits // 8


class ShardLayout(NamedTuple):
    """One output file: the bytes before its data, each tensor's absolute byte offset, the whole size."""

    file_name: str
    header: bytes
    offsets: dict[str, int]
    size: int
    tensors: tuple[OutputTensor, ...]


def stem_like(file_name: str) -> str:
    """What output files are called, before number and suffix, where a model's is called `file_name`."""
    return DIFFUSERS_STEM if file_name.startswith(DIFFUSERS_STEM) else STEM


def lay_out(
    tensors: Sequence[OutputTensor], max_shard_bytes: int, stem: str = STEM
) -> tuple[ShardLayout, ...]:
    """Shards of at most `max_shard_bytes` of data each, filled in the given order.

    A tensor larger than that gets a file of its own. Inside a file: wide types first, then by
    name, so that every tensor is aligned to its element. Names as transformers, or diffusers, writes them.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors) or max_shard_bytes < 1:
        raise ValueError("output names must differ and a shard must hold at least one byte")
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        return (_shard(f"{stem}.safetensors", shards[0]),)
    return tuple(
        _shard(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, 1)
    )


def _split(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """What goes into each file, by the rule of huggingface_hub, whose import alone would take 20 ms."""
    shards: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    filled = 0
    for tensor in tensors:
        if tensor.size > limit:
            shards.append([tensor])
            continue
        if filled + tensor.size > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.size
    return [*shards, current] if current else shards


def _shard(file_name: str, tensors: list[OutputTensor]) -> ShardLayout:
    tensors.sort(key=lambda tensor: (-tensor.dtype.bits, tensor.name))
    header, offsets = encode_header([(t.name, t.dtype, t.shape) for t in tensors], METADATA)
    size = len(header) + sum(tensor.size for tensor in tensors)
    return ShardLayout(file_name, header, offsets, size, tuple(tensors))


def index_name(layouts: Sequence[ShardLayout]) -> str:
    """What the index of these shards is called."""
    return f"{stem_like(layouts[0].file_name)}.safetensors.index.json"


def index_json(layouts: Sequence[ShardLayout]) -> bytes | None:
    """The text of the index; None when one file needs no index."""
    if len(layouts) <= 1:
        return None
    total = sum(tensor.size for layout in layouts for tensor in layout.tensors)
    weight_map = {tensor.name: layout.file_name for layout in layouts for tensor in layout.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def parse_size(text: str) -> int:
    """Bytes for "5GB", "500 MB", "1.5GB" (decimal units), "4GiB" (binary units) or a plain number.

    Not "5B": mergekit's shard sizes count parameters so. Raises PymergeError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)(B?)\s*", text.upper(), re.ASCII)
    if match and match[4] and not match[2] and not match[3]:
        raise PymergeError(f"{shown(text)} would be single bytes, not billions; did you mean {match[1]}GB?")
    units = _BINARY_UNITS if match and match[3] else _UNITS
    # Digits are bounded so that no conversion overflows.
    size = int(float(match[1]) * units[match[2]]) if match and match[2] in units and len(text) < 32 else 0
    if size < 1:
        raise PymergeError(f"{shown(text)} is not a size of at least one byte such as 500MB, 5GB or 4GiB")
    return size
