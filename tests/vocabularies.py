"""Small models whose vocabularies differ, with tokenizers, and the rows that their merge must be made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 24
EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Model:
    """A folder, its tokens in the order of their rows, and its tensors; `tied`: no head of its own."""

    path: Path
    tokens: tuple[str, ...]
    tensors: dict[str, Tensor]

    def rows(self, name: str) -> Tensor:
        """A vocabulary tensor; a head that is tied is the embedding."""
        return self.tensors.get(name, self.tensors[EMBEDDING])

    def row(self, name: str, token: str) -> Tensor | None:
        """The row of a token, if it has one."""
        return self.rows(name)[self.tokens.index(token)] if token in self.tokens else None


def tokenizer_json(tokens: Sequence[str], special: Sequence[str] = (), flags: Any = None) -> dict[str, Any]:
    """A tokenizer of whole words; those in `special` are added tokens."""
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": n, "content": t, **entry, **(flags or {})} for n, t in enumerate(tokens) if t in special]
    vocab = {t: n for n, t in enumerate(tokens) if t not in special}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": next(iter(vocab), "")},
    }


def write_model(
    path: Path,
    tokens: Sequence[str],
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    special: Sequence[str] = (),
    padding: int = 0,
    tied: bool = False,
    template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """A model of three tensors, or two where the head is `tied`; `padding`: rows past those of the tokens."""
    path.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (len(tokens) + padding, WIDTH), HEAD: (len(tokens) + padding, WIDTH), OTHER: (9, 5)}
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    if tied:
        del tensors[HEAD]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    stated = {"model_type": "llama", "vocab_size": len(tokens) + padding, "tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(stated | dict(config or {})))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokens, special)))
    chat = {"chat_template": template} if template else {}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **chat}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return Model(path, tuple(tokens), tensors)


def expected_input(
    models: Sequence[Model],
    base: Model | None,
    own: Model,
    name: str,
    tokens: Sequence[str],
    padding: int = 0,
    rules: Mapping[str, Tensor] | None = None,
    forced: Sequence[str] = (),
) -> Tensor:
    """What `own` contributes: its row; else a rule's, the base's, or the mean of all that there are."""
    rows = []
    for token in tokens:
        row = None if token in forced else own.row(name, token)
        if row is None and rules and token in rules:
            row = rules[token].to(own.rows(name).dtype)
        if row is None and base is not None:
            row = base.row(name, token)
        if row is None:
            held = [found for model in models if (found := model.row(name, token)) is not None]
            row = mean(held) if held else torch.zeros(WIDTH)
        rows.append(row.to(own.rows(name).dtype))
    whole = torch.stack(rows)
    average = whole.double().cumsum(0)[-1] / len(rows)
    return torch.cat([whole, *[average.float().to(whole.dtype)[None]] * padding])


def mean(rows: Sequence[Tensor]) -> Tensor:
    """In float32, one row after the other."""
    total = rows[0].float()
    for row in rows[1:]:
        total = total + row.float()
    return total / len(rows) if len(rows) > 1 else total
