"""Small made-up checkpoints on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pymerge.checkpoint.header import encode_header
from pymerge.dtypes import DType

Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {"a.weight": (40, 50), "b.weight": (70,), "norm": (8,), "empty": (0, 3), "scalar": ()}


def random_bytes(name: str, seed: int, dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Reproducible finite numbers around 0 for floats, small numbers for the rest."""
    random = np.random.default_rng([seed, *name.encode()])
    count = math.prod(shape)
    if dtype is DType.BF16:
        bits = random.standard_normal(count, dtype=np.float32).view(np.uint32) >> np.uint32(16)
        return bits.astype(np.uint16).tobytes()
    if dtype.mergeable:
        return random.standard_normal(count).astype(dtype.torch_name).tobytes()
    return random.integers(0, 2, count * dtype.bits // 8, dtype=np.uint8).tobytes()


def write_file(path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...], bytes]]) -> None:
    """One safetensors file; tensors in the given order."""
    header, _ = encode_header(
        [(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()], {"format": "pt"}
    )
    path.write_bytes(header + b"".join(data for _, _, data in tensors.values()))


def write_checkpoint(
    folder: Path,
    seed: int,
    *,
    shapes: Shapes = SHAPES,
    dtype: DType = DType.BF16,
    dtypes: Mapping[str, DType] | None = None,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """A folder with weights (an index when there are several shards) and config.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, dtype)
        # Integers must be equal in all inputs, so they do not depend on the seed.
        tensors[name] = (kind, shape, random_bytes(name, seed if kind.mergeable else 0, kind, shape))
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        file_name = (
            f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        )
        write_file(folder / file_name, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file_name))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", **(config or {})}))
    return folder


def recipe_text(
    method: str,
    experts: Sequence[Path | str],
    base: Path | str | None,
    weight: float = 1.0,
    **parameters: object,
) -> str:
    """A recipe in the models form; `parameters` go to the top level, lambda_ as lambda."""
    recipe: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": {"weight": weight}} for path in experts],
        "parameters": {name.rstrip("_"): value for name, value in parameters.items()},
    }
    if base is not None:
        recipe["base_model"] = str(base)
    # JSON is YAML.
    return json.dumps(recipe, indent=1)
