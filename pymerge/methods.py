"""THE TABLE of merge methods, and the rule that a row and its parameters amount to.

A method is data: what it is relative to, how it trims, elects and combines. Semantics: mergekit 0.1.5.
A new method is a new row here and a golden test.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from pymerge.errors import ProblemList, RecipeError
from pymerge.rule import Rule, Scope, ThresholdTies, Trim

# Weights whose sum is smaller than this cannot be divided by (mergekit's guard).
SMALLEST_WEIGHT_SUM = 1e-8


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `normalize`, `rescale`, `density`: the defaults where a recipe is silent."""

    name: str
    summary: str
    paper: str
    task_vector: bool = True
    trim: Trim = Trim.NONE
    elect: bool = False
    normalize: bool = False
    rescale: bool = False
    density: float = 1.0


_ROWS = (
    Method(
        name="linear",
        summary="weighted average of the models",
        paper="https://arxiv.org/abs/2203.05482",
        task_vector=False,
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
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_named(name: str) -> Method:
    """The row called `name`; RecipeError lists the known names."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name.replace("-", "_"), METHODS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"unknown merge method {name!r}; {hint}known are {', '.join(METHODS)}")


def rule_for(
    method: Method,
    *,
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    lambda_: float | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: ThresholdTies = ThresholdTies.FIRST,
    scope: Scope = Scope.TENSOR,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Rule:
    """The rule of `method` for `len(weights)` experts; None takes the row's default.

    `names`: what to call the experts in messages (None: their numbers).
    What the row does not use (density without a trim, lambda without task vectors) is made neutral.
    Raises RecipeError for one problem, ProblemList for several: counts, ranges, numbers that are not finite.
    """
    if densities is None:
        densities = (method.density,) * len(weights)
    lambda_ = 1.0 if lambda_ is None else lambda_
    normalize = method.normalize if normalize is None else normalize
    rescale = method.rescale if rescale is None else rescale
    _raise(_problems(method, weights, densities, lambda_, normalize, seed, names))

    trims = method.trim is not Trim.NONE
    return Rule(
        task_vector=method.task_vector,
        trim=method.trim,
        elect=method.elect,
        normalize=normalize,
        rescale=rescale and trims,
        weights=tuple(float(weight) for weight in weights),
        densities=tuple(float(density) if trims else 1.0 for density in densities),
        lambda_=float(lambda_) if method.task_vector else 1.0,
        threshold_ties=threshold_ties,
        scope=scope if method.trim is Trim.MAGNITUDE else Scope.TENSOR,
        seed=seed,
    )


def explain(method: Method) -> str:
    """The row in words: statistics, stages, passes over the inputs, bytes moved; derived from it alone."""
    lines = [f"{method.name}: {method.summary}", f"paper       {method.paper}"]
    lines += [f"{label:<12}{text}" for label, text in _explained(method)]
    return "\n".join(lines)


def _explained(method: Method) -> list[tuple[str, str]]:
    statistics = {
        Trim.NONE: "none",
        Trim.MAGNITUDE: "the k-th largest |d| of each expert, found exactly while merging",
        Trim.RANDOM: "none",
    }[method.trim]
    if method.rescale:
        sums = "sum |d| before and after the trim, for each tensor and expert"
        statistics = sums if statistics == "none" else f"{statistics}; {sums}"
    trim = {
        Trim.NONE: "none: every entry takes part",
        Trim.MAGNITUDE: "keep the int(density * n) largest |d|; among equals the lowest index first (or all)",
        Trim.RANDOM: "keep each entry with probability density, drawn from (seed, tensor, index, expert)",
    }[method.trim]
    elect = "the sign of the sum of the weighted entries; only entries of that sign go on"
    total = "sum of weight * entry"
    combine = f"{total}, divided by the sum of the weights that took part" if method.normalize else total
    if method.task_vector:
        combine += "; times lambda, added to the base"
    streams = "K + 1 inputs (base and experts)" if method.task_vector else "K inputs"
    count = "K + 1" if method.task_vector else "K"
    twice = method.rescale
    number = "2 while density < 1 (1 with rescale: false)" if twice else "1"
    if not twice and method.trim is not Trim.NONE:
        number = "1 (2 with rescale: true)"
    factor = f"{'2 * ' if twice else ''}({count}) * input size" if "+" in count else f"{count} * input size"
    defaults = [f"normalize {str(method.normalize).lower()}"]
    if method.trim is not Trim.NONE:
        defaults += [f"density {method.density:g}", f"rescale {str(method.rescale).lower()}"]
    if method.task_vector:
        defaults.append("lambda 1")
    return [
        ("inputs", f"{streams}, one weight for each expert"),
        ("defaults", ", ".join(defaults)),
        ("statistics", statistics),
        ("trim", trim),
        ("elect", elect if method.elect else "none: every kept entry goes on"),
        ("combine", combine),
        ("passes", number),
        ("bytes", f"for each output element: {factor} read, 1 * output size written"),
    ]


def _problems(
    method: Method,
    weights: Sequence[float],
    densities: Sequence[float],
    lambda_: float,
    normalize: bool,
    seed: int,
    names: Sequence[str] | None,
) -> list[str]:
    problems = []
    who = names or [f"expert {k}" for k in range(max(len(weights), len(densities)))]
    if not weights:
        problems.append(f"{method.name} needs at least one expert")
    if len(densities) != len(weights):
        problems.append(f"{len(densities)} densities for {len(weights)} experts")
    problems += [
        f"weight of {who[k]} is {weight!r}, which is not a finite number in float32"
        for k, weight in enumerate(weights)
        if not _is_float32(weight)
    ]
    problems += [
        f"density of {who[k]} is {density!r}, which is outside 0 to 1"
        for k, density in enumerate(densities)
        if isinstance(density, bool) or not 0 <= density <= 1
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
        problems.append(
            f"the weights of {method.name} sum to {math.fsum(weights):g}, so they cannot be normalized"
        )
    return problems


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
