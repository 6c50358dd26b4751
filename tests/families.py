"""Small families of checkpoints on disk, as other tools write them, and what their merge must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pymerge.backends import reference
from pymerge.rule import Rule

Tensors = dict[str, Tensor]

EMBED = "model.embed_tokens"

# A llama of two layers: name -> shape. The first is large enough for a sampled bracket.
VOCABULARY, HIDDEN, INNER = 1600, 64, 96
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)} | {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }.items()
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """A base and its experts: the folders, and the tensors that were written there."""

    base_path: Path
    expert_paths: tuple[Path, ...]
    base: Tensors
    experts: tuple[Tensors, ...]


def write_checkpoint(folder: Path, tensors: Tensors, shards: int, dtype: torch.dtype | None = None) -> Path:
    """Writes a model folder with the safetensors library; tensors go to `shards` files in turn."""
    folder.mkdir(parents=True)
    name_of = {t: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, t in enumerate(tensors)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        for file in set(name_of.values()):
            part = {t: x for t, x in tensors.items() if name_of[t] == file}
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": name_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stated = {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | stated))
    return folder


def make_family(folder: Path, dtype: torch.dtype, experts: int = 3, extra: Tensors | None = None) -> Family:
    """Heavy-tailed updates with a third of the entries untouched; every model is split differently.

    `extra`: tensors that all models share.
    """
    g = torch.Generator().manual_seed(11)
    base = {name: (0.02 * torch.randn(shape, generator=g)).to(dtype) for name, shape in SHAPES.items()}
    models = [{name: update(x, g) for name, x in base.items()} for _ in range(experts)]
    shared = extra or {}
    base_path = write_checkpoint(folder / "base", base | shared, 3, dtype)
    paths = [
        write_checkpoint(folder / f"expert{k}", shared | dict(reversed(model.items())), 1 + k, dtype)
        for k, model in enumerate(models)
    ]
    return Family(base_path, tuple(paths), base, tuple(models))


def update(x: Tensor, g: torch.Generator) -> Tensor:
    """`x` after a made-up fine-tuning."""
    spread = torch.randn((3, *x.shape), generator=g).square().mean(0).sqrt().clamp(min=1e-3)
    step = 5e-4 * torch.randn(x.shape, generator=g) / spread
    return (x.float() + torch.where(torch.rand(x.shape, generator=g) < 1 / 3, 0.0, step)).to(x.dtype)


def write_recipe(
    path: Path,
    method: str,
    models: Sequence[Path],
    base: Path | None = None,
    parameters: Mapping[str, object] | None = None,
    each: Sequence[Mapping[str, object]] | None = None,
    **top: object,
) -> Path:
    """A recipe file. `each`: the parameters of every model; JSON is YAML."""
    given = each or [{"weight": 1.0}] * len(models)
    entries = [{"model": str(m), "parameters": dict(p)} for m, p in zip(models, given, strict=True)]
    recipe: dict[str, object] = {"merge_method": method, "models": entries, **top}
    if base is not None:
        recipe["base_model"] = str(base)
    if parameters:
        recipe["parameters"] = dict(parameters)
    path.write_text(json.dumps(recipe, indent=1))
    return path


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors of a folder, read by the safetensors library through its index where it has one."""
    index = folder / "model.safetensors.index.json"
    files = (
        set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    )
    tensors: Tensors = {}
    for file in sorted(files):
        with safe_open(folder / file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def weight_digests(folder: Path) -> dict[str, str]:
    """sha256 of every weight file and of the index, by file name."""
    names = sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json")])
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in names}


def expected_merge(
    family: Family, rule: Rule, out: torch.dtype, cast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """What the reference makes of the family's tensors."""
    names = sorted(family.base)
    bases = [family.base[name] for name in names] if rule.task_vector else None
    experts = [[expert[name] for expert in family.experts] for name in names]
    merged = reference.merge_group(names, bases, experts, rule, [out] * len(names), cast)
    return dict(zip(names, merged, strict=True))


def write_lora(
    folder: Path,
    modules: Mapping[str, int],
    seed: int,
    whole: Tensors | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """A PEFT folder with factors of the given ranks; and per module the factors, left and right."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    turned = bool(config.get("fan_in_fan_out"))
    tensors: Tensors = {f"base_model.model.{name}.weight": x for name, x in (whole or {}).items()}
    factors = {}
    for module, rank in modules.items():
        shape = SHAPES[f"{module}.weight"]
        flip = turned or module == EMBED
        out, into = reversed(shape) if flip else shape
        a, b = (0.1 * torch.randn(s, generator=g).to(dtype) for s in ((rank, into), (out, rank)))
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBED
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"base_model.model.{module}.{n}": x for n, x in zip(names, (a, b), strict=True)}
        factors[module] = (a.T, b.T) if flip else (b, a)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder, factors
