"""The values that recipe parameters may take once parsed."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.errors import RecipeError
from pymerge.rule import Scope, ThresholdTies

Parameter: TypeAlias = "bool | float | Scope | ThresholdTies"


class Preset(Enum):
    """Whose semantics the method names carry."""

    MERGEKIT = "mergekit"


def merging_dtype(name: str) -> DType:
    """float64, float32, float16 or bfloat16, with or without `torch.`; RecipeError for any other."""
    found = BY_TORCH_NAME.get(name.removeprefix("torch."))
    if found is None or not found.mergeable:
        known = ", ".join(dtype.torch_name for dtype in DType if dtype.mergeable)
        raise RecipeError(f"{name!r} is not a type that merges; known are {known}")
    return found
