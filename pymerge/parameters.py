"""The values that recipe parameters may take once parsed, and what one tensor makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.errors import RecipeError
from pymerge.rule import Scope, ThresholdTies

Scalar: TypeAlias = "bool | float | Scope | ThresholdTies"

EVERY = "*"


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over a stack of layers: numbers are interpolated, flags picked."""

    values: tuple[float, ...]

    def at(self, t: float) -> float:
        """The value at `t`, 0 in the first layer and 1 in the last."""
        place = t * (len(self.values) - 1)
        first = int(place)
        low, high = self.values[first], self.values[min(first + 1, len(self.values) - 1)]
        if isinstance(low, bool):
            return low
        share = place - first
        return (1 - share) * low + share * high


class Case(NamedTuple):
    """One entry of a conditional list: `value` for the tensors whose name contains `filter`."""

    filter: str
    value: Scalar | Gradient

    @property
    def takes_all(self) -> bool:
        """Whether no tensor gets past it."""
        return self.filter == EVERY

    def takes(self, name: str) -> bool:
        """Whether it holds for the tensor called `name`."""
        return self.takes_all or self.filter in name


@dataclass(frozen=True, slots=True)
class Conditional:
    """A conditional list: its first case that takes a tensor counts; where none does, the next scope."""

    cases: tuple[Case, ...]


Parameter: TypeAlias = "Scalar | Gradient | Conditional"


class Preset(Enum):
    """Whose semantics the method names carry."""

    MERGEKIT = "mergekit"
    PAPER = "paper"
    PEFT = "peft"
    FUSIONBENCH = "fusionbench"


def cases_of(scopes: Sequence[Mapping[str, Parameter]], name: str) -> tuple[Case, ...]:
    """All that `scopes`, the nearest first, say of the parameter `name`, as far as any tensor gets."""
    found: list[Case] = []
    for scope in scopes:
        given = scope.get(name)
        if given is None:
            continue
        for case in given.cases if isinstance(given, Conditional) else (Case(EVERY, given),):
            found.append(case)
            if case.takes_all:
                return tuple(found)
    return tuple(found)


def value_at(cases: Sequence[Case], name: str, t: float) -> Scalar | None:
    """What `cases` give the tensor called `name` at `t`; None where none takes it."""
    for case in cases:
        if case.takes(name):
            return case.value.at(t) if isinstance(case.value, Gradient) else case.value
    return None


# What some call the types; mergekit does not take these either.
SHORT_NAMES = MappingProxyType(
    {
        "bf16": DType.BF16,
        "fp16": DType.F16,
        "f16": DType.F16,
        "half": DType.F16,
        "fp32": DType.F32,
        "f32": DType.F32,
        "float": DType.F32,
        "fp64": DType.F64,
        "f64": DType.F64,
        "double": DType.F64,
    }
)


def merging_dtype(name: str) -> DType:
    """float64, float32, float16 or bfloat16, with or without `torch.`; RecipeError for any other."""
    plain = name.removeprefix("torch.")
    found = BY_TORCH_NAME.get(plain)
    if found is None and (meant := SHORT_NAMES.get(plain.lower())):
        raise RecipeError(f"{name!r} is not a type that merges; did you mean {meant.torch_name}?")
    if found is None or not found.mergeable:
        known = ", ".join(dtype.torch_name for dtype in DType if dtype.mergeable)
        raise RecipeError(f"{name!r} is not a type that merges; known are {known}")
    return found
