"""The family that both tools merge: a base and four experts, shaped like Qwen2 (with biases) or Llama."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import Tensors, update, write_checkpoint

EXPERTS = 4
LAYERS, HIDDEN, INNER, VOCABULARY = 4, 64, 96, 256
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.k_proj.bias": (HIDDEN // 2,),
    "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj.bias": (HIDDEN // 2,),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
# mergekit cannot change the number of Qwen2's layers (its configuration lists them), but Llama's.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER.items()},
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}


def coarse(name: str, x: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 significant bits in the later half: equal magnitudes, and sums that cancel exactly."""
    late = any(f"layers.{layer}." in name for layer in range(LAYERS // 2, LAYERS))
    return x.to(torch.bfloat16).to(x.dtype) if late else x


def write_family(folder: Path, dtype: torch.dtype, biases: bool = True) -> None:
    """Writes `base` and `expert-0` .. below `folder`; the same bytes every time."""
    kind = QWEN2 if biases else LLAMA
    g = torch.Generator().manual_seed(23)
    base: Tensors = {}
    for name, shape in SHAPES.items():
        if name.endswith("bias") and not biases:
            continue
        center = 1.0 if "norm" in name else 0.0
        base[name] = coarse(name, center + 0.02 * torch.randn(shape, generator=g)).to(dtype)
    models = {"base": base}
    for k in range(EXPERTS):
        tuned = {name: coarse(name, update(x.float(), g)).to(dtype) for name, x in base.items()}
        models[f"expert-{k}"] = tuned
    for number, (name, tensors) in enumerate(models.items()):
        place = write_checkpoint(folder / name, tensors, 1 + number % 3, dtype)
        stated = {"torch_dtype": str(dtype).removeprefix("torch.")}
        (place / "config.json").write_text(json.dumps(kind | CONFIG | stated))
