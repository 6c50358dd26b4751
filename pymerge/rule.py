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
    RANKED = "ranked"
    VARIANCE = "variance"
    IMPORTANCE = "importance"

    @property
    def by_magnitude(self) -> bool:
        """Whether thresholds decide, which have to be searched for."""
        return self in (Trim.MAGNITUDE, Trim.OUTLIERS)

    @property
    def drawn(self) -> bool:
        """Whether random words decide."""
        return self in (Trim.RANDOM, Trim.RANKED)

    @property
    def scored(self) -> bool:
        """Whether one score for each element decides for all experts alike."""
        return self in (Trim.VARIANCE, Trim.IMPORTANCE)


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


class Fuse(Enum):
    """How the entries of one element become one, where that is not a weighted sum."""

    SWAP = "swap"
    OVERLAP = "overlap"
    ENERGY = "energy"
    LARGEST = "largest"
    ELECTED = "elected"
    CONSENSUS = "consensus"


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
class Fusing:
    """A fuse and its numbers.

    `t`: how near (swap), the threshold (overlap), how much of the others' sum (consensus). `boost`,
    `most_boost`: by how much an entry that stands alone is raised (overlap). `votes`: how many experts must
    claim an entry (consensus).
    """

    kind: Fuse
    t: float = 0.0
    boost: float = 0.0
    most_boost: float = 0.0
    votes: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor's arithmetic, every default filled in; sequences hold one entry per expert.

    `task_vector`: experts are taken relative to the base (False: there is no base, or it is an expert).
    `weights`, `densities`: in recipe order; `gammas`: the shares that are outliers, where
    a trim drops them; `epsilons`: how far a density goes up and down with the rank, where it does. `lambda_`:
    factor on the merged task vector.
    `blend`: the coefficients come from the inputs; None: they are the weights. `fuse`: entries become one by
    a formula of their own.
    `copy`: the one input is the result, byte for byte, wherever the type stays.
    `one_more`: a trim by magnitude keeps one entry more than int(density * n), as the TIES authors' code.
    `late_weights`: factors on the entries that agree, which neither vote nor divide a mean; none: all 1.
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
    epsilons: tuple[float, ...] = ()
    blend: Blending | None = None
    fuse: Fusing | None = None
    copy: bool = False
    one_more: bool = False
    late_weights: tuple[float, ...] = ()

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for GPUs that follow it."""
        known = self.trim in (Trim.NONE, Trim.MAGNITUDE, Trim.RANDOM, Trim.OUTLIERS) and not self.one_more
        return known and self.blend is None and self.fuse is None


def check_rule(rule: Rule, backend: str) -> None:
    """BackendError for a rule that the kernels for GPUs do not follow."""
    if not rule.has_kernels:
        special = rule.blend or rule.fuse
        what = special.kind.value if special else rule.trim.value
        what = "a trim that keeps one entry more than int(density * n)" if rule.one_more else what
        raise BackendError(f"the {backend} backend has no kernels for {what}; the cpu backend has")


def passes(rule: Rule, length: int = READ_ONCE + 1) -> int:
    """How often the inputs are read: once, and once more for each kind of sums or scores that comes first.

    `length`: elements of the vectors that a blend takes one by one; by default long ones. Where memory holds
    no scores of a whole tensor, these take more readings.
    """
    if rule.blend is not None:
        return 2 if length > READ_ONCE else 1
    sums = rule.rescale and any(density < 1 for density in rule.densities)
    if rule.fuse is not None:
        sums = rule.fuse.kind is Fuse.ENERGY or rule.fuse.boost != 0
    if rule.trim is Trim.IMPORTANCE:
        return 3 + sums
    return 1 + sums + (rule.trim is Trim.VARIANCE and rule.densities[0] < 1)
