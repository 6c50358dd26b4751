"""Tokenizers as the files beside the weights hold them: which token has which row, and more tokens added."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint.sidefiles import MAX_SIDE_FILE_BYTES, folder_of
from pymerge.errors import CheckpointError
from pymerge.files import Malformed, json_object, object_in, read_file
from pymerge.text import shown

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
# What says the same in another form; it would contradict a tokenizer.json that was given more tokens.
OTHER_FORMS = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
)
TOKENIZER_FILES = (
    TOKENIZER_NAME,
    CONFIG_NAME,
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    *OTHER_FORMS,
)
# Token ids are row numbers; no vocabulary comes near this.
_MOST_TOKENS = 10_000_000
# Ids without a token that a small vocabulary may have; large ones may have as many as tokens.
_MOST_GAPS = 10_000


class Tokenizer(NamedTuple):
    """`ids`: the row of each token; `added`: the entries of `added_tokens` by token; `data`: tokenizer.json.

    `fresh`: the tokens among them that are not in the file.
    """

    path: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]
    fresh: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows that its tokens need."""
        return max(self.ids.values(), default=-1) + 1


def read_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer beside the weights; raises CheckpointError, where there is no tokenizer.json too."""
    path = folder_of(checkpoint) / TOKENIZER_NAME
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{path}: the file does not exist, so nobody knows which row is which token; transformers'"
            " save_pretrained of a fast tokenizer writes it"
        )
    data = read_file(path, MAX_SIDE_FILE_BYTES)
    try:
        content = json_object(data)
        ids, added = _tokens(content)
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    return Tokenizer(path, ids, added, content)


def _tokens(content: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: pairs of token and score
        pairs = [entry[0] if isinstance(entry, list) and entry else None for entry in vocab]
        if not all(isinstance(token, str) for token in pairs):
            raise Malformed("the vocabulary is no list of texts and scores")
        ids: dict[Any, Any] = {token: number for number, token in enumerate(pairs)}
    elif isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        raise Malformed("the tokenizer has no vocabulary under model")
    entries = content.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Malformed("added_tokens is no list of mappings")
    if not all(isinstance(entry.get("content"), str) for entry in entries):
        raise Malformed("added_tokens has an entry whose content is no text")
    added = {entry.get("content"): entry for entry in entries}
    ids |= {token: entry.get("id") for token, entry in added.items()}
    for token, number in ids.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < _MOST_TOKENS:
            raise Malformed(f"token {shown(token)} has the id {shown(number)}, expected a number of a row")
    _check_rows(ids)
    return ids, added


def _check_rows(ids: Mapping[str, int]) -> None:
    """Every row is one token's, and few are no token's: a table of rows is as long as the largest id."""
    if len(set(ids.values())) < len(ids):
        first: dict[int, str] = {}
        for token, number in ids.items():
            if (other := first.setdefault(number, token)) != token:
                raise Malformed(f"tokens {shown(other)} and {shown(token)} both have the id {number}")
    last = max(ids, key=ids.__getitem__, default="")
    if ids and ids[last] >= 2 * len(ids) + _MOST_GAPS:
        raise Malformed(
            f"token {shown(last)} has the id {ids[last]:,}, far past the {len(ids):,} tokens that there are"
        )


def with_tokens(tokenizer: Tokenizer, others: Sequence[Tokenizer], more: Sequence[str] = ()) -> Tokenizer:
    """`tokenizer` and, after its own, the tokens that only `others` have, then those of `more`.

    In the order of the others and of their ids, those of their vocabularies before those that were added to
    them. Every new token is an added one, which keeps the flags that it has there.
    """
    ordinary: dict[str, Mapping[str, Any]] = {}
    special: dict[str, Mapping[str, Any]] = {}
    for other in others:
        for token in sorted(other.ids, key=other.ids.__getitem__):
            if token not in tokenizer.ids:
                into = special if token in other.added else ordinary
                into.setdefault(token, other.added.get(token, {}))
    ordinary = {token: entry for token, entry in ordinary.items() if token not in special}
    named = dict.fromkeys(token for token in more if token not in tokenizer.ids)
    fresh = ordinary | special | {t: {} for t in named if t not in ordinary and t not in special}
    first = tokenizer.size
    entries = {token: _entry(token, first + n, entry) for n, (token, entry) in enumerate(fresh.items())}
    if not entries:
        return tokenizer
    return Tokenizer(
        tokenizer.path,
        {**tokenizer.ids, **{token: entry["id"] for token, entry in entries.items()}},
        {**tokenizer.added, **entries},
        {**tokenizer.data, "added_tokens": [*(tokenizer.data.get("added_tokens") or []), *entries.values()]},
        tuple(entries),
    )


def _entry(token: str, number: int, known: Mapping[str, Any]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": number, "content": token, **{name: known.get(name, flag) for name, flag in flags.items()}}


def tokenizer_files(tokenizer: Tokenizer, carried: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer that was read and perhaps extended; `carried`: those that lie beside it."""
    files = {name: carried[name] for name in TOKENIZER_FILES if name in carried}
    if not tokenizer.fresh:
        return files
    files = {name: data for name, data in files.items() if name not in OTHER_FORMS}
    files[TOKENIZER_NAME] = _json(tokenizer.data)
    if CONFIG_NAME in files:
        config = object_in(tokenizer.path.parent / CONFIG_NAME, files[CONFIG_NAME])
        # transformers reads added tokens there before those of tokenizer.json.
        if isinstance(decoder := config.get("added_tokens_decoder"), dict):
            new = [tokenizer.added[token] for token in tokenizer.fresh]
            decoder |= {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in new}
            files[CONFIG_NAME] = _json(config)
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("ascii")
