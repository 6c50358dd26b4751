"""The fastest exact merge engine for model checkpoints.

merge(recipe, out)          checkpoints on disk into a new checkpoint
plan(recipe)                what that would do, from headers alone
merge_tensors(base, experts) tensors in memory

Nothing is imported before it is used: `import pymerge` needs neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pymerge.version import VERSION as __version__

if TYPE_CHECKING:
    from pymerge.api import merge, plan
    from pymerge.tensors import merge_tensors

__all__ = ["__version__", "merge", "merge_tensors", "plan"]

_HOMES = {"merge": "pymerge.api", "plan": "pymerge.api", "merge_tensors": "pymerge.tensors"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
