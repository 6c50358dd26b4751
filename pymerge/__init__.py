"""The fastest exact merge engine for model checkpoints.

merge(recipe, out)          checkpoints on disk into a new checkpoint
plan(recipe)                what that would do, from headers alone
plan_documents(recipe)      the same for a recipe of several YAML documents
sweep(recipe, out, settings) the same with several settings, from one reading
merge_tensors(base, experts) tensors in memory
Session(base, experts)      many merges of the same tensors
merge_state_dicts(base, experts) models in memory: torch modules, or dicts of tensors
merge_into(model, experts)   the same, into a model's own parameters
load_recipe, parse_recipe   a Recipe from a file or from text, for merge and plan

Nothing is imported before it is used: `import pymerge` needs neither numpy nor torch.
"""

from __future__ import annotations

from pymerge.version import VERSION as __version__

TYPE_CHECKING = False  # not typing's: the sooner the command runs, the sooner it can be interrupted quietly

if TYPE_CHECKING:
    from pymerge.api import merge, plan, plan_documents, plan_sweep, sweep
    from pymerge.dtypes import DType
    from pymerge.errors import PymergeError
    from pymerge.models import merge_into, merge_state_dicts
    from pymerge.planner import Plan
    from pymerge.recipe import Recipe, load_recipe, parse_recipe
    from pymerge.run.results import Summary
    from pymerge.session import Session
    from pymerge.tensors import merge_tensors

__all__ = [
    "DType",
    "Plan",
    "PymergeError",
    "Recipe",
    "Session",
    "Summary",
    "__version__",
    "load_recipe",
    "merge",
    "merge_into",
    "merge_state_dicts",
    "merge_tensors",
    "parse_recipe",
    "plan",
    "plan_documents",
    "plan_sweep",
    "sweep",
]

_HOMES = {
    "DType": "pymerge.dtypes",
    "Plan": "pymerge.planner",
    "PymergeError": "pymerge.errors",
    "Recipe": "pymerge.recipe",
    "Session": "pymerge.session",
    "Summary": "pymerge.run.results",
    "load_recipe": "pymerge.recipe",
    "merge": "pymerge.api",
    "merge_into": "pymerge.models",
    "merge_state_dicts": "pymerge.models",
    "merge_tensors": "pymerge.tensors",
    "parse_recipe": "pymerge.recipe",
    "plan": "pymerge.api",
    "plan_documents": "pymerge.api",
    "plan_sweep": "pymerge.api",
    "sweep": "pymerge.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
