"""THE TABLE of merge methods, and the rule that a row and its parameters amount to.

A method is data: what it is relative to, how it trims, elects and combines. Semantics: mergekit 0.1.5.
A new method is a new row here and a golden test.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from pymerge.blending import blending, complete
from pymerge.errors import ProblemList, RecipeError
from pymerge.rule import Blend, Rule, Scope, ThresholdTies, Trim

# Weights whose sum is smaller than this cannot be divided by (mergekit's guard).
SMALLEST_WEIGHT_SUM = 1e-8


class Base(Enum):
    """What a method does with the base: nothing; subtracts it, always or if there is one; or it is an expert.

    FIRST: the first of the experts, and required. MEMBER: listed or not, one of them like any other.
    """

    UNUSED = "unused"
    ORIGIN = "origin"
    OPTIONAL_ORIGIN = "optional origin"
    FIRST = "first"
    MEMBER = "member"


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `normalize`, `rescale`, `density`, `gamma`: the defaults where a recipe is silent.

    `fewest`, `most`: how many experts it takes, the base among them where it is one. `weighted`: every expert
    needs a weight. `own`: parameters that only this method has.
    """

    name: str
    summary: str
    paper: str
    base: Base = Base.ORIGIN
    blend: Blend | None = None
    weighted: bool = True
    fewest: int = 1
    most: int | None = None
    own: tuple[str, ...] = ()
    trim: Trim = Trim.NONE
    elect: bool = False
    normalize: bool = False
    rescale: bool = False
    density: float = 1.0
    gamma: float = 0.01

    @property
    def task_vector(self) -> bool:
        """Whether experts are taken relative to a base, which must be given."""
        return self.base is Base.ORIGIN


_ROWS = (
    Method(
        name="linear",
        summary="weighted average of the models",
        paper="https://arxiv.org/abs/2203.05482",
        base=Base.UNUSED,
        normalize=True,
    ),
    Method(
        name="task_arithmetic",
        summary="base plus the weighted sum of the task vectors",
        paper="https://arxiv.org/abs/2212.04089",
    ),
    Method(
        name="ties",
        summary="keep each task vector's largest entries, elect a sign, average those that agree",
        paper="https://arxiv.org/abs/2306.01708",
        trim=Trim.MAGNITUDE,
        elect=True,
        normalize=True,
    ),
    Method(
        name="dare_linear",
        summary="drop random entries of each task vector, rescale the rest, sum",
        paper="https://arxiv.org/abs/2311.03099",
        trim=Trim.RANDOM,
        rescale=True,
    ),
    Method(
        name="dare_ties",
        summary="drop random entries of each task vector, rescale the rest, elect a sign, sum what agrees",
        paper="https://arxiv.org/abs/2311.03099",
        trim=Trim.RANDOM,
        elect=True,
        rescale=True,
    ),
    Method(
        name="breadcrumbs",
        summary="drop each task vector's outliers and its small entries, sum",
        paper="https://arxiv.org/abs/2312.06795",
        trim=Trim.OUTLIERS,
    ),
    Method(
        name="breadcrumbs_ties",
        summary="drop each task vector's outliers and its small entries, elect a sign, sum what agrees",
        paper="https://arxiv.org/abs/2312.06795",
        trim=Trim.OUTLIERS,
        elect=True,
    ),
    Method(
        name="slerp",
        summary="the point at share t of the arc from the base to one other model",
        paper="https://doi.org/10.1145/325165.325242",
        base=Base.FIRST,
        blend=Blend.SLERP,
        weighted=False,
        fewest=2,
        most=2,
        own=("t",),
    ),
    Method(
        name="nuslerp",
        summary="the point on the arc between two models (or task vectors) that their weights give",
        paper="https://doi.org/10.1145/325165.325242",
        base=Base.OPTIONAL_ORIGIN,
        blend=Blend.NUSLERP,
        fewest=2,
        most=2,
        own=("nuslerp_flatten", "nuslerp_row_wise"),
    ),
    Method(
        name="multislerp",
        summary="the weighted mean direction of models (or task vectors) at their mean length",
        paper="https://arxiv.org/abs/2403.13257",
        base=Base.OPTIONAL_ORIGIN,
        blend=Blend.MULTISLERP,
        own=("normalize_weights", "eps"),
    ),
    Method(
        name="karcher",
        summary="the Riemannian (Karcher) mean of the models' directions at their mean length",
        paper="https://doi.org/10.1002/cpa.3160300502",
        base=Base.MEMBER,
        blend=Blend.KARCHER,
        weighted=False,
        own=("max_iter", "tol"),
    ),
    Method(
        name="model_stock",
        summary="from the base toward the experts' mean, as far as the angle between their task vectors says",
        paper="https://arxiv.org/abs/2403.19522",
        blend=Blend.MODEL_STOCK,
        weighted=False,
        fewest=2,
        own=("filter_wise",),
    ),
    Method(
        name="passthrough",
        summary="one model as it is, or times a number",
        paper="https://arxiv.org/abs/2403.13257",
        base=Base.MEMBER,
        weighted=False,
        most=1,
        own=("scale",),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_named(name: str) -> Method:
    """The row called `name`; RecipeError lists the known names."""
    if name in METHODS:
        return METHODS[name]
    from difflib import get_close_matches  # late: only for what is wrong

    near = get_close_matches(name.replace("-", "_"), METHODS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown merge method {name!r}; {hint}known are {', '.join(METHODS)}")


def rule_for(
    method: Method,
    *,
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    lambda_: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: ThresholdTies = ThresholdTies.FIRST,
    scope: Scope = Scope.TENSOR,
    seed: int = 0,
    names: Sequence[str] | None = None,
    options: Mapping[str, object] | None = None,
    has_base: bool = False,
) -> Rule:
    """The rule of `method` for `len(weights)` experts; None takes the row's default.

    `names`: what to call the experts in messages (None: their numbers). `options`: the method's own
    parameters. `has_base`: there is a base that the experts may be taken relative to.
    What the row does not use (density without a trim, lambda without task vectors) is made neutral.
    Raises RecipeError for one problem, ProblemList for several: counts, ranges, numbers that are not finite.
    """
    if densities is None:
        densities = (method.density,) * len(weights)
    if gammas is None:
        gammas = (method.gamma,) * len(weights)
    lambda_ = 1.0 if lambda_ is None else lambda_
    normalize = method.normalize if normalize is None else normalize
    rescale = method.rescale if rescale is None else rescale
    problems = _problems(method, weights, densities, gammas, lambda_, normalize, seed, names)
    values = complete(method.own, options or {}, problems)
    if not method.weighted:
        weights = (values.get("scale", 1.0),) * len(weights)
    if method.blend is Blend.MULTISLERP and not problems:
        normalize = bool(values["normalize_weights"])
        if normalize and abs(math.fsum(weights)) < SMALLEST_WEIGHT_SUM:
            problems.append(_zero_sum(method, weights))
    _raise(problems)

    trims = method.trim is not Trim.NONE
    alone = len(weights) == 1 and method.blend is Blend.MULTISLERP  # there is nothing to blend
    origin = method.base is Base.ORIGIN or (method.base is Base.OPTIONAL_ORIGIN and has_base and not alone)
    return Rule(
        task_vector=origin,
        trim=method.trim,
        elect=method.elect,
        normalize=normalize and not alone,
        rescale=rescale and trims,
        weights=(1.0,) if alone else tuple(float(weight) for weight in weights),
        densities=tuple(float(density) if trims else 1.0 for density in densities),
        lambda_=float(lambda_) if origin and method.blend is None else 1.0,
        threshold_ties=threshold_ties,
        scope=scope if method.trim.by_magnitude else Scope.TENSOR,
        seed=seed,
        gammas=tuple(map(float, gammas)) if method.trim is Trim.OUTLIERS else (),
        blend=None if method.blend is None or alone else blending(method.blend, values),
        copy=alone or values.get("scale") == 1,
    )


def _problems(
    method: Method,
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    lambda_: float,
    normalize: bool,
    seed: int,
    names: Sequence[str] | None,
) -> list[str]:
    problems = []
    who = names or [f"expert {k}" for k in range(max(len(weights), len(densities), len(gammas)))]
    if not weights:
        problems.append(f"{method.name} needs at least one expert")
    elif not method.fewest <= len(weights) <= (method.most or len(weights)):
        exactly = "exactly" if method.fewest == method.most else "at least"
        what = "models, the base among them" if method.base in (Base.FIRST, Base.MEMBER) else "experts"
        wanted = f"{exactly} {method.fewest} {what}" if method.fewest > 1 else "exactly one model"
        problems.append(f"{method.name} takes {wanted}, found {len(weights)}")
    if len(densities) != len(weights):
        problems.append(f"{len(densities)} densities for {len(weights)} experts")
    if len(gammas) != len(weights):
        problems.append(f"{len(gammas)} gammas for {len(weights)} experts")
    problems += [
        f"weight of {who[k]} is {weight!r}, which is not a finite number in float32"
        for k, weight in enumerate(weights)
        if not _is_float32(weight)
    ]
    for name, shares in (("density", densities), ("gamma", gammas)):
        problems += [
            f"{name} of {who[k]} is {share!r}, which is outside 0 to 1"
            for k, share in enumerate(shares)
            if isinstance(share, bool) or not 0 <= share <= 1
        ]
    if not _is_float32(lambda_):
        problems.append(f"lambda is {lambda_!r}, which is not a finite number in float32")
    if not 0 <= seed < 2**64:
        problems.append(f"seed is {seed}, which is outside 0 to 2**64 - 1")
    if (
        normalize
        and not method.elect
        and weights
        and not problems
        and abs(_float32_sum(weights)) < SMALLEST_WEIGHT_SUM
    ):
        problems.append(_zero_sum(method, weights))
    return problems


def _zero_sum(method: Method, weights: Sequence[float]) -> str:
    return f"the weights of {method.name} sum to {math.fsum(weights):g}, so they cannot be normalized"


def _float32_sum(numbers: Sequence[float]) -> float:
    """The sum as the kernels take it: each number and each partial sum rounded to float32."""
    total = 0.0
    for number in numbers:
        total = _float32(total + _float32(number))
    return total


def _float32(number: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def _is_float32(number: float) -> bool:
    try:
        struct.pack("<f", number)
        return not isinstance(number, bool) and math.isfinite(number)
    except OverflowError:
        return False


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise RecipeError(problems[0])
    if problems:
        raise ProblemList(problems)
