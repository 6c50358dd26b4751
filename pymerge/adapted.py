"""What a recipe names beside plain models: models with a LoRA, and what the tokenizer shall be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Adapted(NamedTuple):
    """A model and the LoRA to be added to it: two folders."""

    model: Path
    lora: Path

    @property
    def path(self) -> Path:
        """What stands for both of them wherever a model's path is asked for, as mergekit writes it."""
        return Path(f"{self.model}+{self.lora}")


class TokenRule(NamedTuple):
    """Where the row of one token comes from in models that lack it, or with `force` in all.

    `model`: its row of `token` or of `token_id`; None: zeros.
    """

    model: Path | None
    token: str | None
    token_id: int | None
    force: bool


class TokenizerRule(NamedTuple):
    """Which tokenizer the output gets: that of `source`, the base's (None), or with `union` every token.

    `pad_to_multiple_of`: what the number of rows is rounded up to.
    """

    source: Path | None
    union: bool
    tokens: Mapping[str, TokenRule]
    pad_to_multiple_of: int
