"""Small safetensors files for these tests, made byte by byte so that they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw(header: str | bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file: length (the true one unless given), header, data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode("utf-8") if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_tensors(path: Path, names: list[str], fill: int = 0) -> Path:
    """A good file that holds one U8 tensor of two bytes for each name."""
    table = {name: entry("U8", [2], 2 * i, 2 * i + 2) for i, name in enumerate(names)}
    path.write_bytes(raw(table, bytes([fill]) * (2 * len(names))))
    return path


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))
    return path
