"""Models with a LoRA: the folder that PEFT writes, as products that are added to the model's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.adapted import Adapted
from pymerge.checkpoint.header import TensorEntry, read_header
from pymerge.checkpoint.index import Checkpoint, Seen, Shard, TensorRef, open_checkpoint
from pymerge.errors import CheckpointError, ProblemList, collected
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
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save(\.default)?\.")
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
    problems: list[str] = []
    path = both.lora / WEIGHTS_NAME
    model = collected(problems, lambda: open_checkpoint(both.model, seen))
    config = collected(problems, lambda: _read_config(both.lora))
    header = collected(problems, lambda: read_header(path))
    if header is None:
        raise ProblemList(problems)
    number = len(model.shards) if model else 0
    refs = {name: TensorRef(number, entry) for name, entry in header.tensors.items()}
    pairs, whole = _sorted_out(path, refs, problems)
    if model is None:
        raise ProblemList(problems)
    problems += _misfits(path, model, pairs, whole)
    tensors = {**model.tensors, **whole}
    made: dict[str, Source] = {}
    for pair in pairs if config is not None else ():
        name = f"{pair.module}.weight"
        if name in tensors:
            try:
                made[name] = _product(config or {}, pair, tensors[name], first_file)
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
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    if problems := [f"{path}: {problem}" for problem in _wrong_in(config)]:
        raise ProblemList(problems)
    return config


def _wrong_in(config: Mapping[str, Any]) -> Iterator[str]:
    """What a configuration asks for that cannot be done, one clause each."""
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            yield f"{key} {shown(config[key])} is not supported" if key in config else f"{key} is missing"
    if not _is_rank(config.get("r")):
        yield f"r is {shown(config.get('r'))}, expected a whole number above 0"
    if not _is_factor(config.get("lora_alpha")):
        yield f"lora_alpha is {shown(config.get('lora_alpha'))}, expected a number from 1e-9 to 1e9"
    for key in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(key) or False, bool):
            yield f"{key} is {shown(config[key])}, expected true or false"
    expected = {"rank_pattern": (_is_rank, "whole numbers above 0"), "alpha_pattern": (_is_factor, "numbers")}
    for key, (fits, what) in expected.items():
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            yield f"{key} is {shown(pattern)}, expected a mapping of {what}"
            continue
        if any(len(text) > _LONGEST_PATTERN or _REPEATED_GROUP.search(text) for text in pattern):
            yield f"{key} has a pattern that is too long or repeats a group"
        for text, value in pattern.items():
            if not fits(value):
                yield f"{key} has {shown(value)} for {shown(text)}, expected {what}"


def _is_factor(value: object) -> bool:
    """Whether a scale can be made of it that is neither 0 nor infinite in float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-9 <= value <= 1e9


def _is_rank(value: object) -> bool:
    return _is_factor(value) and value == int(value)  # type: ignore[call-overload]


def _sorted_out(
    path: Path, refs: Mapping[str, TensorRef], problems: list[str]
) -> tuple[list[_Pair], dict[str, TensorRef]]:
    """The pairs of factors, and by their names in the model the tensors that replace the model's.

    Problems are added: what is not supported, and tensors that say the same thing twice.
    """
    factors: dict[tuple[str, bool], dict[str, TensorRef]] = {}
    whole: dict[str, TensorRef] = {}
    said: dict[tuple[str, str], str] = {}
    for name, ref in refs.items():
        short = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        match = _FACTOR.fullmatch(short)
        target = match[1] if match else _MODULES_TO_SAVE.sub(".", short).removesuffix(".weight")
        # What a tensor is of its module; one that is saved whole stands beside no factor.
        for part in (match[3],) if match else ("A", "B", "whole"):
            if (first := said.setdefault((target, part), name)) != name:
                problems.append(
                    f"{path}: tensors {shown(first)} and {shown(name)} are both for {shown(target)}"
                )
                break
        if match:
            factors.setdefault((match[1], match[2] is not None), {})[match[3]] = ref
        elif ".lora_" in short or ".vera_" in short:
            problems.append(
                f"{path}: tensor {shown(name)} is of a kind that is not supported (DoRA, or a bias)"
            )
        else:
            whole[_MODULES_TO_SAVE.sub(".", short)] = ref
    for (module, _), found in factors.items():
        if len(found) < 2:
            problems.append(f"{path}: {shown(module)} has lora_{next(iter(found))} without the other factor")
    pairs = [_Pair(m, e, found["A"], found["B"]) for (m, e), found in factors.items() if len(found) == 2]
    return pairs, whole


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
