"""Models with a LoRA: the folder that PEFT writes, as products that are added to the model's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.adapted import Adapted
from pymerge.checkpoint.header import TensorEntry, read_header
from pymerge.checkpoint.index import Checkpoint, Seen, Shard, TensorRef, open_checkpoint
from pymerge.errors import CheckpointError, ProblemList
from pymerge.files import Malformed, json_object, read_file
from pymerge.job import Product, Region, Source
from pymerge.text import shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 10_000_000

_PREFIX = "base_model.model."
# A repeated group can make a search take for ever, and the pattern comes from someone else's file.
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_LONGEST_PATTERN = 1000
_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.[^.]+)??(\.weight)?")
# Keys of the configuration that change the arithmetic, and the values that leave it as it is.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two factors of one module, as the adapter names them."""

    module: str
    embedding: bool
    a: TensorRef
    b: TensorRef


def open_adapted(both: Adapted, first_file: int, seen: Seen) -> tuple[Checkpoint, dict[str, Source]]:
    """The model with its LoRA as one checkpoint, and the tensors made of both.

    Tensors that the LoRA keeps whole (modules_to_save) stand in place of the model's. `first_file`: the
    number of the model's first file; `seen`: as `open_checkpoint` takes it. Raises CheckpointError or
    ProblemList.
    """
    model = open_checkpoint(both.model, seen)
    config = _read_config(both.lora)
    path = both.lora / WEIGHTS_NAME
    header = read_header(path)
    number = len(model.shards)
    refs = {name: TensorRef(number, entry) for name, entry in header.tensors.items()}
    pairs, whole = _sorted_out(path, refs)
    problems = [*_misfits(path, model, pairs, whole)]
    tensors = {**model.tensors, **whole}
    made: dict[str, Source] = {}
    for pair in pairs if not problems else ():
        name = f"{pair.module}.weight"
        try:
            made[name] = _product(config, pair, tensors[name], first_file)
        except Malformed as problem:
            problems.append(f"{path}: tensor {shown(name)}: {problem}")
    if problems:
        raise ProblemList(problems)
    return Checkpoint(both.path, (*model.shards, Shard(path, header)), tensors), made


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    data = read_file(path, MAX_CONFIG_BYTES)
    try:
        config = json_object(data)
        for key, plain in _PLAIN.items():
            if config.get(key) not in plain:
                raise Malformed(
                    f"{key} {shown(config[key])} is not supported" if key in config else f"{key} is missing"
                )
        for key in ("r", "lora_alpha"):
            if not _is_number(config.get(key)):
                raise Malformed(f"{key} is {shown(config.get(key))}, expected a number above 0")
        for key in ("use_rslora", "fan_in_fan_out"):
            if not isinstance(config.get(key) or False, bool):
                raise Malformed(f"{key} is {shown(config[key])}, expected true or false")
        ranks = [config["r"]]
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(key) or {}
            if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
                raise Malformed(f"{key} is no mapping of numbers")
            ranks += pattern.values() if key == "rank_pattern" else ()
            if any(len(text) > _LONGEST_PATTERN or _REPEATED_GROUP.search(text) for text in pattern):
                raise Malformed(f"{key} has a pattern that is too long or repeats a group")
        if any(rank != int(rank) for rank in ranks):
            raise Malformed(
                f"a rank is {shown(next(r for r in ranks if r != int(r)))}, expected a whole number"
            )
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _sorted_out(path: Path, refs: Mapping[str, TensorRef]) -> tuple[list[_Pair], dict[str, TensorRef]]:
    """The pairs of factors, and by their names in the model the tensors that replace the model's."""
    factors: dict[tuple[str, bool], dict[str, TensorRef]] = {}
    whole: dict[str, TensorRef] = {}
    problems = []
    for name, ref in refs.items():
        short = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if match := _FACTOR.fullmatch(short):
            factors.setdefault((match[1], match[2] is not None), {})[match[3]] = ref
        elif ".lora_" in short or ".vera_" in short:
            problems.append(
                f"{path}: tensor {shown(name)} is of a kind that is not supported (DoRA, or a bias)"
            )
        else:
            whole[re.sub(r"\.modules_to_save(\.default)?\.", ".", short)] = ref
    for (module, _), found in factors.items():
        if len(found) < 2:
            problems.append(f"{path}: {shown(module)} has lora_{next(iter(found))} without the other factor")
    if problems:
        raise ProblemList(problems)
    return [_Pair(m, e, found["A"], found["B"]) for (m, e), found in factors.items()], whole


def _misfits(path: Path, model: Checkpoint, pairs: list[_Pair], whole: Mapping[str, TensorRef]) -> list[str]:
    problems = []
    for name in [*(f"{pair.module}.weight" for pair in pairs), *whole]:
        if name not in model.tensors:
            problems.append(f"{path}: it changes tensor {shown(name)}, which {model.path} lacks")
    for name, ref in whole.items():
        if name in model.tensors and (theirs := model.tensors[name].entry.shape) != ref.entry.shape:
            problems.append(
                f"{path}: tensor {shown(name)} has shape {list(ref.entry.shape)}, expected {list(theirs)}"
                f" as in {model.path}"
            )
    return problems


def _product(config: Mapping[str, Any], pair: _Pair, ref: TensorRef, first_file: int) -> Product:
    """`ref`'s tensor with the product of the pair; Malformed when they do not fit."""
    rank = _of_module(config, "rank_pattern", "r", pair.module)
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", pair.module)
    turned = pair.embedding or bool(config.get("fan_in_fan_out"))
    a, b, target = pair.a.entry, pair.b.entry, ref.entry
    if len(target.shape) != 2:
        raise Malformed(f"the model's tensor has shape {list(target.shape)}, expected rows and columns")
    out, into = reversed(target.shape) if turned else target.shape
    expected = ((int(rank), into), (out, int(rank)))
    if (a.shape, b.shape) != expected:
        raise Malformed(
            f"the factors have shapes {list(a.shape)} and {list(b.shape)}, expected {list(expected[0])} and"
            f" {list(expected[1])} for shape {list(target.shape)} and rank {int(rank)}"
        )
    if not (a.dtype.mergeable and b.dtype.mergeable and target.dtype.mergeable):
        raise Malformed("its elements are no floats")
    left, right = (pair.a, pair.b) if turned else (pair.b, pair.a)

    def region(found: TensorRef, entry: TensorEntry) -> Region:
        return Region(entry.dtype, entry.begin, first_file + found.shard)

    return Product(
        region(ref, target),
        region(left, left.entry),
        region(right, right.entry),
        rows=target.shape[0],
        width=target.shape[1],
        rank=int(rank),
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        transposed=turned,
    )


def _of_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """A number of the configuration, of the first pattern that the end of the module's name fits."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        except (re.error, OverflowError, RecursionError):
            raise Malformed(f"{patterns}: {shown(pattern)} is no regular expression") from None
    return float(config[default])
