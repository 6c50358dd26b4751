"""The rule that a row of the table and its parameters amount to."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from pymerge.blending import blending, complete, fusing
from pymerge.errors import ProblemList, RecipeError
from pymerge.methods import Base, Method
from pymerge.rule import Blend, Rule, Scope, ThresholdTies, Trim

# Weights whose sum is smaller than this cannot be divided by (mergekit's guard).
SMALLEST_WEIGHT_SUM = 1e-8


def rule_for(
    method: Method,
    *,
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    lambda_: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: ThresholdTies = ThresholdTies.FIRST,
    scope: Scope = Scope.TENSOR,
    seed: int = 0,
    names: Sequence[str] | None = None,
    options: Mapping[str, object] | None = None,
    has_base: bool = False,
    one_more: bool = False,
    late_weights: Sequence[float] = (),
) -> Rule:
    """The rule of `method` for `len(weights)` experts; None takes the row's default.

    `names`: what to call the experts in messages (None: their numbers). `options`: the method's own
    parameters. `has_base`: there is a base that the experts may be taken relative to. `one_more`,
    `late_weights`: see `Rule`.
    What the row does not use (density without a trim, lambda without task vectors) is made neutral.
    Raises RecipeError for one problem, ProblemList for several: counts, ranges, numbers that are not finite.
    """
    if densities is None:
        densities = (method.density,) * len(weights)
    if gammas is None:
        gammas = (method.gamma,) * len(weights)
    if epsilons is None:
        epsilons = (method.epsilon,) * len(weights)
    lambda_ = 1.0 if lambda_ is None else lambda_
    normalize = method.normalize if normalize is None else normalize
    rescale = method.rescale if rescale is None else rescale
    problems = _problems(method, weights, densities, gammas, lambda_, normalize, seed, names)
    problems += _weight_problems(late_weights, names)
    values = complete(method.own, options or {}, problems)
    if "votes" in values and not problems and int(values["votes"]) > len(weights):
        problems.append(
            f"votes is {values['votes']:g}, more than the {len(weights)} experts, so nothing is kept"
        )
    if method.trim is Trim.RANKED and not problems:
        problems += _ranked_problems(densities, epsilons, names)
    if not method.weighted:
        weights = (values.get("scale", 1.0),) * len(weights)
    if method.blend is Blend.MULTISLERP and not problems:
        normalize = bool(values["normalize_weights"])
        if normalize and abs(math.fsum(weights)) < SMALLEST_WEIGHT_SUM:
            problems.append(_zero_sum(method, weights))
    _raise(problems)

    if method.trim is Trim.VARIANCE:
        densities = (float(values["select_topk"]),) * len(weights)
    alone = len(weights) == 1 and method.blend is Blend.MULTISLERP  # there is nothing to blend
    origin = method.base is Base.ORIGIN or (method.base is Base.OPTIONAL_ORIGIN and has_base and not alone)
    return Rule(
        task_vector=origin,
        trim=method.trim,
        elect=method.elect,
        normalize=normalize and not alone,
        rescale=rescale and method.dense,
        weights=(1.0,) if alone else tuple(float(weight) for weight in weights),
        densities=tuple(
            float(density) if method.dense or method.trim is Trim.VARIANCE else 1.0 for density in densities
        ),
        lambda_=float(lambda_) if method.scales else 1.0,
        threshold_ties=threshold_ties,
        scope=scope if method.trim.by_magnitude else Scope.TENSOR,
        seed=seed,
        gammas=tuple(map(float, gammas)) if method.trim is Trim.OUTLIERS else (),
        epsilons=tuple(map(float, epsilons)) if method.trim is Trim.RANKED else (),
        blend=None if method.blend is None or alone else blending(method.blend, values),
        fuse=None if method.fuse is None else fusing(method.fuse, values),
        copy=alone or values.get("scale") == 1,
        one_more=one_more and method.trim is Trim.MAGNITUDE,
        late_weights=tuple(float(weight) for weight in late_weights),
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
    who = names or _numbers(max(len(weights), len(densities), len(gammas)))
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
    problems += _weight_problems(weights, names)
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


def _weight_problems(weights: Sequence[float], names: Sequence[str] | None) -> list[str]:
    who = names or _numbers(len(weights))
    return [
        f"weight of {who[k]} is {weight!r}, which is not a finite number in float32"
        for k, weight in enumerate(weights)
        if not _is_float32(weight)
    ]


def _ranked_problems(
    densities: Sequence[float], epsilons: Sequence[float], names: Sequence[str] | None
) -> list[str]:
    if len(epsilons) != len(densities):
        return [f"{len(epsilons)} epsilons for {len(densities)} experts"]
    return [
        f"density {density:g} of {who} less and plus epsilon {epsilon!r}"
        " must lie between 0 and 1, both excluded"
        for density, epsilon, who in zip(densities, epsilons, names or _numbers(len(densities)), strict=True)
        if 0 < density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1)
    ]


def _numbers(count: int) -> list[str]:
    """What experts without names are called."""
    return [f"expert {k}" for k in range(count)]


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
