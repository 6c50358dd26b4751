"""Makes a llama-shaped family to measure with: a base and K experts, sharded bf16 safetensors.

Updates are heavy-tailed (Student's t, 3 degrees of freedom), and a third of the entries is untouched. Values
come from pools of a few million, read from a random place for every block: seconds, not minutes, per billion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint.index import INDEX_NAME
from pymerge.checkpoint.layout import OutputTensor, lay_out
from pymerge.dtypes import DType

BLOCK = 1 << 18  # elements made at a time: all of its arrays stay in cache
POOL = 1 << 22
HEAD = 64
# parameters from which a width is used: hidden, inner, vocabulary
WIDTHS = (
    (0, 128, 384, 1_000),
    (20_000_000, 512, 1408, 8_000),
    (100_000_000, 768, 2048, 32_000),
    (400_000_000, 1536, 4096, 32_000),
    (1_500_000_000, 2048, 5632, 32_000),
)


@dataclass(frozen=True)
class Shape:
    """A llama: its tensors (name to shape, in file order) and its config.json."""

    tensors: dict[str, tuple[int, ...]]
    config: dict[str, object]

    @property
    def parameters(self) -> int:
        """Number of elements of one model."""
        return sum(int(np.prod(shape)) for shape in self.tensors.values())


def llama(parameters: int) -> Shape:
    """The narrowest llama of our widths that has at least so many parameters."""
    _, hidden, inner, vocabulary = max(row for row in WIDTHS if row[0] <= parameters)
    heads = hidden // HEAD
    kv = HEAD * max(1, heads // 4)
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    outside = 2 * vocabulary * hidden + hidden
    layers = max(1, -(-(parameters - outside) // sum(int(np.prod(shape)) for shape in layer.values())))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv // HEAD,
        "head_dim": HEAD,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Shape(tensors, config)


def mixture(tensors: int) -> Shape:
    """A mixture of experts of so many tensors of 64 x 32, 384 to a layer, for what each tensor costs."""
    names = ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{i // 384}.mlp.experts.{i % 384 // 3}.{names[i % 3]}.weight": (64, 32)
        for i in range(tensors)
    }
    layers = -(-tensors // 384)
    return Shape(shapes, {"model_type": "mixtral", "num_hidden_layers": layers, "torch_dtype": "bfloat16"})


class Pools:
    """Values to draw base weights and updates from; the same for every family."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.base = to_bf16(0.02 * rng.standard_normal(POOL + BLOCK, dtype=np.float32))
        update = (5e-4 * rng.standard_t(3, POOL + BLOCK)).astype(np.float32)
        update[rng.random(POOL + BLOCK) < 1 / 3] = 0
        self.update = update

    def blocks(self, count: int, tensor: int, expert: int) -> Iterator[NDArray[np.uint16]]:
        """The bf16 bits of one tensor, block after block; expert 0 is the base."""
        for number in range(-(-count // BLOCK)):
            size = min(BLOCK, count - number * BLOCK)
            at = int(np.random.default_rng([tensor, number]).integers(POOL))
            base = self.base[at : at + size]
            if expert == 0:
                yield base
                continue
            at = int(np.random.default_rng([tensor, number, expert]).integers(POOL))
            wide = (base.astype(np.uint32) << np.uint32(16)).view(np.float32)
            yield to_bf16(wide + self.update[at : at + size])


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite `x` rounded to bf16, to nearest even."""
    u = x.view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def write_model(folder: Path, shape: Shape, pools: Pools, expert: int, shard_bytes: int) -> None:
    """Writes one model: shards, index, config.json."""
    folder.mkdir(parents=True)
    layouts = lay_out([OutputTensor(n, DType.BF16, s) for n, s in shape.tensors.items()], shard_bytes)
    numbers = {name: i for i, name in enumerate(shape.tensors)}
    for layout in layouts:
        with (folder / layout.file_name).open("wb") as file:
            file.write(layout.header)
            for tensor in layout.tensors:
                for block in pools.blocks(int(np.prod(tensor.shape)), numbers[tensor.name], expert):
                    file.write(block.data)
    if len(layouts) > 1:
        weight_map = {tensor.name: layout.file_name for layout in layouts for tensor in layout.tensors}
        index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))


def make_family(folder: Path, parameters: int, experts: int, shard_bytes: int = 200_000_000) -> Shape:
    """Makes a llama's base, expert1 .. expertK under `folder`; a model that is there already is kept."""
    return write_family(folder, llama(parameters), experts, shard_bytes)


def write_family(folder: Path, shape: Shape, experts: int, shard_bytes: int) -> Shape:
    """`make_family` for any shape."""
    pools = Pools()
    names = ["base", *(f"expert{k}" for k in range(1, experts + 1))]
    missing = [
        (k, folder / name) for k, name in enumerate(names) if not (folder / name / "config.json").exists()
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda item: write_model(item[1], shape, pools, item[0], shard_bytes), missing))
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=float, default=156e6, help="parameters of one model, at least")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shard-bytes", type=float, default=200e6)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--experts-of", type=int, metavar="TENSORS", help="a mixture of so many tiny tensors")
    given = parser.parse_args()
    shape = llama(int(given.params)) if given.experts_of is None else mixture(given.experts_of)
    write_family(given.folder, shape, given.experts, int(given.shard_bytes))
    if given.json:
        print(json.dumps({"parameters": shape.parameters}))
    else:
        print(f"{shape.parameters:,} parameters, {given.experts} experts and their base in {given.folder}")


if __name__ == "__main__":
    main()
