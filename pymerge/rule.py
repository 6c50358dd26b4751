"""The arithmetic of one merged tensor, as data: what every backend is given and must obey."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor's arithmetic, every default filled in; sequences hold one entry per expert.

    `task_vector`: experts are taken relative to the base (False: linear, no base at all).
    `weights`, `densities`: in recipe order; `gammas`: the shares that are outliers, where
    a trim drops them. `lambda_`: factor on the merged task vector.
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

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for GPUs that follow it."""
        return self.trim is not Trim.OUTLIERS
