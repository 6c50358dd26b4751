"""The small files beside the weights: those carried over from the base, and the model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pymerge.checkpoint.header import Malformed, open_regular, read_exactly, shown_path
from pymerge.dtypes import DType
from pymerge.errors import CheckpointError

# An allow-list: whatever else lies there (code, optimizer state, pickles) never travels.
SIDE_FILES = (
    "config.json",
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

_DTYPE_KEYS = ("dtype", "torch_dtype")
_HUB_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)


def collect(base: Path, dtype: DType | None) -> dict[str, bytes]:
    """The allow-listed files beside the weights at `base`, a folder or one file in it.

    config.json gets `dtype` under whichever of "dtype" and "torch_dtype" it has (both, when both),
    else under "torch_dtype"; `dtype` None leaves it as it is. Raises CheckpointError.
    """
    folder = base if base.is_dir() else base.parent
    files = {name: _read(folder / name) for name in SIDE_FILES if os.path.lexists(folder / name)}
    if dtype is not None and "config.json" in files:
        files["config.json"] = _with_dtype(folder / "config.json", files["config.json"], dtype)
    return files


def _read(path: Path) -> bytes:
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > MAX_SIDE_FILE_BYTES:
            raise CheckpointError(
                f"{shown_path(path)}: the file has {size} bytes, allowed are at most {MAX_SIDE_FILE_BYTES}"
            )
        try:
            return read_exactly(fd, size, 0)
        except Malformed as problem:
            raise CheckpointError(f"{shown_path(path)}: {problem}") from None


def _with_dtype(path: Path, text: bytes, dtype: DType) -> bytes:
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown_path(path)}: the file is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{shown_path(path)}: the JSON is not an object")
    for key in [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]:
        config[key] = dtype.torch_name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


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
    from huggingface_hub import ModelCardData  # late: 130 ms

    sources = ([base_model] if base_model else []) + list(models)
    hub_names = [found for found in map(hub_name, dict.fromkeys(sources)) if found]
    data = ModelCardData(
        base_model=list(dict.fromkeys(hub_names)) or None,
        library_name="transformers",
        tags=["merge", "pymerge"],
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    cited = f" ({paper})" if paper else ""
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_plain(name)}\n",
        f"Merged by pymerge with the method `{method}`{cited}.\n",
        *([f"Base model: {_plain(hub_name(base_model) or base_model)}\n"] if base_model else []),
        "Merged models:\n",
        *(f"- {_plain(hub_name(model) or model)}" for model in models),
        f"\n## Recipe\n\n{fence}yaml\n{recipe.rstrip()}\n{fence}\n",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def hub_name(source: str) -> str | None:
    """`owner/name` when `source` is one or lies in a Hub cache, else None."""
    cached = _HUB_CACHE.search(source + "/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return source if _HUB_NAME.fullmatch(source) and "--" not in source and ".." not in source else None


def _plain(text: str) -> str:
    """`text` on one line and without Markdown's meaning."""
    printable = "".join(c if c.isprintable() else "�" for c in text)
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", printable)
