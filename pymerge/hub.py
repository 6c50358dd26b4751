"""Models on the Hugging Face hub, as files in its cache; the library is imported only when one is named."""

from __future__ import annotations

import re
from pathlib import Path

from pymerge.errors import RecipeError

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
# What lies in folders of a repository (other formats, other parts of a pipeline) is not read.
WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
UNWANTED = ("*/*",)
_REASONS = {
    "GatedRepoError": "its owner has to grant access first",
    "RepositoryNotFoundError": "there is no such model, or it is private",
    "RevisionNotFoundError": "it has no such revision",
    "LocalEntryNotFoundError": "it is not in the cache, and the hub is switched off or out of reach",
}


def is_hub_name(text: str) -> bool:
    """Whether `text` can be owner/name on the hub."""
    return _NAME.fullmatch(text) is not None


def fetch(name: str, revision: str | None) -> Path:
    """The folder of a snapshot of `name`, downloaded unless the cache has it; raises RecipeError.

    Cache, token and offline mode are the library's own.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RecipeError(
            f"{name} may be a name on the Hugging Face hub; install huggingface_hub to have it looked up"
        ) from None
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except Exception as error:  # of the library, of its HTTP client, of the network: none is a defect here
        raise RecipeError(f"{name} cannot be had from the Hugging Face hub: {_reason(error)}") from error
    return Path(found)


def _reason(error: Exception) -> str:
    """Why, by the library's kind of error; else the first sentence of its own words."""
    for kind in type(error).__mro__:
        if kind.__name__ in _REASONS:
            return _REASONS[kind.__name__]
    words = " ".join(str(error).split())
    return re.split(r"(?<=[a-z)'])\. ", words)[0].rstrip(".") if words else type(error).__name__
