"""A made-up family of checkpoints for the demo: a base and experts, llama-shaped, bf16, in shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint.header import encode_header
from pymerge.checkpoint.index import INDEX_NAME
from pymerge.dtypes import DType

Bits: TypeAlias = NDArray[np.uint16]
Maker: TypeAlias = Callable[[str, tuple[int, ...]], Bits]

EXPERTS = 8
LAYERS, HIDDEN, INNER, VOCABULARY, HEADS = 8, 256, 704, 4096, 4
UNTOUCHED = 1 / 3  # share of the entries that a fine-tune leaves as they are
SHARDS = 3


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, 8.5 M elements in total."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            found[f"{prefix}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            found[f"{prefix}.mlp.{name}_proj.weight"] = (INNER, HIDDEN)
        found[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def make_family(folder: Path) -> tuple[Path, list[Path]]:
    """Write base and experts below `folder`; the same bytes every time. Returns their folders."""
    base = folder / "base"
    experts = [folder / f"expert-{k}" for k in range(EXPERTS)]
    makers: list[Maker] = [_base_tensor, *(partial(_expert_tensor, k=k) for k in range(EXPERTS))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_write, [base, *experts], makers))
    return base, experts


def _base_tensor(name: str, shape: tuple[int, ...]) -> Bits:
    random = _random(name, 0)
    values = random.standard_normal(shape, dtype=np.float32)
    return round_to_bf16(
        np.float32(1) + values / np.float32(32) if len(shape) == 1 else values / np.float32(50)
    )


def _expert_tensor(name: str, shape: tuple[int, ...], k: int) -> Bits:
    """The base plus a heavy-tailed update of some of its entries."""
    base = _base_tensor(name, shape)
    random = _random(name, k + 1)
    update = random.standard_normal(shape, dtype=np.float32)
    update *= np.float32(0.002) * (1 + update * update)
    update[random.random(shape, dtype=np.float32) < UNTOUCHED] = 0
    return round_to_bf16(from_bf16(base) + update)


def _random(name: str, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64([stream, *name.encode()]))


def round_to_bf16(values: NDArray[np.float32]) -> Bits:
    """Finite f32 to bf16 bits, to nearest, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: Bits) -> NDArray[np.float32]:
    """bf16 bits to f32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _write(folder: Path, tensor: Maker) -> None:
    folder.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(_split(list(shapes()))):
        file_name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        entries = [(name, DType.BF16, shapes()[name]) for name in names]
        header, _ = encode_header(entries, {"format": "pt"})
        with (folder / file_name).open("xb") as file:
            file.write(header)
            for name, _, shape in entries:
                file.write(tensor(name, shape).tobytes())
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_config(), indent=2))


def _split(names: list[str]) -> Iterator[list[str]]:
    for number in range(SHARDS):
        yield names[len(names) * number // SHARDS : len(names) * (number + 1) // SHARDS]


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
