"""The arithmetic of one merged tensor, as data: what every backend is given and must obey."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pymerge.errors import BackendError

# Elements of a vector that a blend reads once: it merges them while they are in the cache, as csrc/stream/
# blend.cpp says too.
READ_ONCE = 32_768


class Trim(Enum):
    """Which entries of a task vector take part."""

    NONE = "none"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    OUTLIERS = "outliers"

    @property
    def by_magnitude(self) -> bool:
        """Whether thresholds decide, which have to be searched for."""
        return self in (Trim.MAGNITUDE, Trim.OUTLIERS)


class ThresholdTies(Enum):
    """Which entries equal to the threshold are kept: the lowest flat indices, or all."""

    FIRST = "first"
    ALL = "all"


class Scope(Enum):
    """What the k largest entries are taken over: each tensor, or the whole model."""

    TENSOR = "tensor"
    MODEL = "model"


class Blend(Enum):
    """What the coefficients of a linear map are computed from the inputs' Gram matrix as."""

    SLERP = "slerp"
    NUSLERP = "nuslerp"
    MULTISLERP = "multislerp"
    KARCHER = "karcher"
    MODEL_STOCK = "model_stock"


class Vectors(Enum):
    """What one Gram matrix is taken over: the whole tensor, each row (last axis), or each column (first)."""

    TENSOR = "tensor"
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class Blending:
    """A blend and its numbers: `t` (slerp), `eps` (multislerp), `max_iter` and `tol` (karcher)."""

    kind: Blend
    vectors: Vectors = Vectors.TENSOR
    t: float = 0.0
    eps: float = 1e-8
    max_iter: int = 10
    tol: float = 1e-5


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor's arithmetic, every default filled in; sequences hold one entry per expert.

    `task_vector`: experts are taken relative to the base (False: there is no base, or it is an expert).
    `weights`, `densities`: in recipe order; `gammas`: the shares that are outliers, where
    a trim drops them. `lambda_`: factor on the merged task vector.
    `blend`: the coefficients come from the inputs; None: they are the weights.
    `copy`: the one input is the result, byte for byte, wherever the type stays.
    """

    task_vector: bool
    trim: Trim
    elect: bool
    normalize: bool
    rescale: bool
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    lambda_: float = 1.0
    threshold_ties: ThresholdTies = ThresholdTies.FIRST
    scope: Scope = Scope.TENSOR
    seed: int = 0
    gammas: tuple[float, ...] = ()
    blend: Blending | None = None
    copy: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for GPUs that follow it."""
        return self.blend is None


def check_rule(rule: Rule, backend: str) -> None:
    """BackendError for a rule that the kernels for GPUs do not follow."""
    if not rule.has_kernels:
        what = rule.trim.value if rule.blend is None else rule.blend.kind.value
        raise BackendError(f"the {backend} backend has no kernels for {what}; the cpu backend has")


def passes(rule: Rule, length: int = READ_ONCE + 1) -> int:
    """How often the inputs are read: once, or twice when a rescale or a blend needs sums first.

    `length`: elements of the vectors that a blend takes one by one; by default long ones.
    """
    if rule.blend is not None:
        return 2 if length > READ_ONCE else 1
    return 2 if rule.rescale and any(density < 1 for density in rule.densities) else 1
