"""The small files beside the weights: those carried over from the base, and the model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymerge.dtypes import DType
from pymerge.errors import CheckpointError, ProblemList
from pymerge.files import Malformed, json_object, read_file

# An allow-list: whatever else lies there (code, optimizer state, pickles) never travels.
CONFIG_NAME = "config.json"
SIDE_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "NOTICE.md",
)
MAX_SIDE_FILE_BYTES = 256 * 2**20  # the largest tokenizers are a tenth of this
MAX_CONFIG_BYTES = 10_000_000

_DTYPE_KEYS = ("dtype", "torch_dtype")
# How model families call their number of layers.
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HUB_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)


def collect(base: Path) -> dict[str, bytes]:
    """The allow-listed files beside the weights at `base`, a folder or one file in it.

    Raises ProblemList naming each file that cannot be read, and a config.json that is none.
    """
    folder = folder_of(base)
    files: dict[str, bytes] = {}
    problems = []
    for name in SIDE_FILES:
        try:
            if os.path.lexists(folder / name):
                files[name] = read_file(folder / name, MAX_SIDE_FILE_BYTES)
        except CheckpointError as problem:
            problems.append(str(problem))
    try:
        read_config(base)
    except CheckpointError as problem:
        problems.append(str(problem))
    if problems:
        raise ProblemList(list(dict.fromkeys(problems)))
    return files


def folder_of(checkpoint: Path) -> Path:
    """The folder that the weights lie in, given that or the file."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def read_config(checkpoint: Path) -> dict[str, Any]:
    """What config.json beside the weights says, nothing when there is none; else CheckpointError."""
    path = folder_of(checkpoint) / CONFIG_NAME
    if not os.path.lexists(path):
        return {}
    data = read_file(path, MAX_CONFIG_BYTES)
    try:
        return json_object(data)
    except Malformed as problem:
        raise CheckpointError(f"{path}: {problem}") from None


def with_dtype(path: Path, config: bytes, dtype: DType) -> bytes:
    """`config`, the text of `path`, with `dtype` under "dtype" or "torch_dtype", whichever it has (or both).

    With neither it goes under "torch_dtype". Raises CheckpointError.
    """
    try:
        content = json_object(config)
        for key in [key for key in _DTYPE_KEYS if key in content] or ["torch_dtype"]:
            content[key] = dtype.torch_name
        # Plain ASCII, as transformers writes it: half a surrogate pair has no other form.
        return (json.dumps(content, indent=2) + "\n").encode("ascii")
    except (Malformed, RecursionError) as problem:
        raise CheckpointError(f"{path}: {problem}") from None


def with_layers(config: bytes, layers: Sequence[int]) -> bytes:
    """`config`, JSON already checked, for a model made of these of its layers: their number, lists by layer.

    Without a key for the number it stays as it is.
    """
    content = json_object(config)
    for part in (content, content.get("text_config")):
        if not isinstance(part, dict):
            continue
        stated = {key: part[key] for key in _COUNT_KEYS if type(part.get(key)) is int}
        for count in set(stated.values()):
            for key, value in part.items():
                by_layer = "layer" in key and isinstance(value, list) and len(value) == count > max(layers)
                if by_layer:
                    part[key] = [value[layer] for layer in layers]
        part.update(dict.fromkeys(stated, len(layers)))
    return (json.dumps(content, indent=2) + "\n").encode("ascii")


def with_vocabulary(config: bytes, rows: int) -> bytes:
    """`config`, JSON already checked, for a vocabulary of `rows` rows."""
    content = json_object(config)
    parts = [part for part in (content, content.get("text_config")) if isinstance(part, dict)]
    for part in [part for part in parts if "vocab_size" in part] or parts[:1]:
        part["vocab_size"] = rows
    return (json.dumps(content, indent=2) + "\n").encode("ascii")


def vocabulary_of(folder: Path) -> int | None:
    """The rows of the vocabulary, as far as config.json states them; raises CheckpointError."""
    config = read_config(folder)
    text = config.get("text_config")
    stated = text.get("vocab_size") if isinstance(text, dict) else None
    found = stated if stated is not None else config.get("vocab_size")
    return found if type(found) is int else None


def without_ties(config: bytes) -> bytes:
    """`config`, JSON already checked, for a model whose head is not its embedding."""
    return (json.dumps(json_object(config) | {"tie_word_embeddings": False}, indent=2) + "\n").encode("ascii")


def ties_head(folder: Path) -> bool:
    """Whether config.json says that the head is the embedding; raises CheckpointError."""
    return read_config(folder).get("tie_word_embeddings") is True


def states_layers(config: bytes) -> bool:
    """Whether `config`, JSON already checked, says how many layers the model has."""
    content = json_object(config)
    parts = (content, content.get("text_config"))
    return any(isinstance(part, dict) and key in part for part in parts for key in _COUNT_KEYS)


def model_card(
    *,
    name: str,
    method: str,
    base_model: str | None,
    models: Sequence[str],
    recipe: str,
    paper: str | None = None,
) -> bytes:
    """README.md: front matter for the Hub, then method, base, inputs and the recipe as it was given.

    `base_model` and `models` are paths or Hub names. Only Hub names, found in cache paths too, go
    into the front matter, because the Hub refuses a card whose base_model is a local path.
    """
    import yaml  # late: 20 ms, and a plan has no card

    sources = ([base_model] if base_model else []) + list(models)
    hub_names = [found for found in map(hub_name, dict.fromkeys(sources)) if found]
    # As huggingface_hub.ModelCardData writes it, whose import would take another 40 ms.
    data = {"base_model": list(dict.fromkeys(hub_names))} if hub_names else {}
    front = yaml.dump(
        {**data, "library_name": "transformers", "tags": ["merge", "pymerge"]},
        allow_unicode=True,
        sort_keys=False,
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    cited = f" ({paper})" if paper else ""
    lines = [
        f"---\n{front}---\n",
        f"# {_plain(name)}\n",
        f"Merged by pymerge with the method `{method}`{cited}.\n",
        *([f"Base model: {_plain(_told(base_model))}\n"] if base_model else []),
        "Merged models:\n",
        *(f"- {_plain(_told(model))}" for model in models),
        f"\n## Recipe\n\n{fence}yaml\n{recipe.rstrip()}\n{fence}\n",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _told(source: str) -> str:
    """What a card calls a model: its name on the Hub, or its path, from the working directory on if there."""
    return hub_name(source) or source.replace(f"{os.getcwd()}/", "")


def hub_name(source: str) -> str | None:
    """`owner/name` when `source` is one or lies in a Hub cache, else None; a path that exists wins."""
    cached = _HUB_CACHE.search(source + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if _HUB_NAME.fullmatch(source) and os.path.lexists(source):
        return None
    return source if _HUB_NAME.fullmatch(source) and "--" not in source and ".." not in source else None


def _plain(text: str) -> str:
    """`text` on one line and without Markdown's meaning."""
    printable = "".join(c if c.isprintable() else "�" for c in text)
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", printable)
