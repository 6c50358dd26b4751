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
from enum import Enum
from types import MappingProxyType

from pymerge.blending import DEFAULTS, blending, complete
from pymerge.errors import ProblemList, RecipeError
from pymerge.rule import READ_ONCE, Blend, Rule, Scope, ThresholdTies, Trim

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
    """One row. `normalize`, `rescale`, `density`: the defaults where a recipe is silent.

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
    lambda_ = 1.0 if lambda_ is None else lambda_
    normalize = method.normalize if normalize is None else normalize
    rescale = method.rescale if rescale is None else rescale
    problems = _problems(method, weights, densities, lambda_, normalize, seed, names)
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
        scope=scope if method.trim is Trim.MAGNITUDE else Scope.TENSOR,
        seed=seed,
        blend=None if method.blend is None or alone else blending(method.blend, values),
        copy=alone or values.get("scale") == 1,
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
    if method.blend:
        statistics = "the inner products of all pairs of inputs; from them one coefficient for each"
    trim = {
        Trim.NONE: "none: every entry takes part",
        Trim.MAGNITUDE: "keep the int(density * n) largest |d|; among equals the lowest index first (or all)",
        Trim.RANDOM: "keep each entry with probability density, drawn from (seed, tensor, index, expert)",
    }[method.trim]
    elect = "the sign of the sum of the weighted entries; only entries of that sign go on"
    if method.name == "passthrough":
        combine = "entry * scale; with scale 1 the bytes themselves"
    else:
        total = f"sum of {'coefficient' if method.blend else 'weight'} * entry"
        combine = f"{total}, divided by the sum of the weights that took part" if method.normalize else total
    added = {
        Base.ORIGIN: "added to the base" if method.blend else "times lambda, added to the base",
        Base.OPTIONAL_ORIGIN: "added to the base where there is one",
    }.get(method.base)
    combine += f"; {added}" if added else ""
    count, streams = {
        Base.UNUSED: ("K", "K inputs"),
        Base.ORIGIN: ("K + 1", "K + 1 inputs (base and experts)"),
        Base.OPTIONAL_ORIGIN: ("K", "K inputs, and a base or none"),
        Base.FIRST: ("K", "K inputs, the base first"),
        Base.MEMBER: ("K", "K inputs"),
    }[method.base]
    if method.most == method.fewest:
        streams = streams.replace("K inputs", "1 input" if method.most == 1 else f"{method.most} inputs")
    twice = method.rescale or method.blend is not None
    number = "2 while density < 1 (1 with rescale: false)" if twice else "1"
    if method.blend:
        number = f"2 (1 for tensors, or rows, of up to {READ_ONCE:,} elements)"
    elif not twice and method.trim is not Trim.NONE:
        number = "1 (2 with rescale: true)"
    factor = f"{'2 * ' if twice else ''}({count}) * input size" if "+" in count else f"{count} * input size"
    if twice and "+" not in count:
        factor = f"2 * {factor}"
    defaults = [] if method.blend or method.own else [f"normalize {str(method.normalize).lower()}"]
    if method.trim is not Trim.NONE:
        defaults += [f"density {method.density:g}", f"rescale {str(method.rescale).lower()}"]
    if method.task_vector and not method.blend:
        defaults.append("lambda 1")
    defaults += own_defaults(method)
    return [
        ("inputs", f"{streams}, one weight for each expert" if method.weighted else streams),
        ("defaults", ", ".join(defaults)),
        ("statistics", statistics),
        ("trim", trim),
        ("elect", elect if method.elect else "none: every kept entry goes on"),
        ("combine", combine),
        ("passes", number),
        ("bytes", f"for each output element: {factor} read, 1 * output size written"),
    ]


def own_defaults(method: Method) -> list[str]:
    """The parameters that only this method has, each with what it is where a recipe is silent."""
    words = []
    for name in method.own:
        value = DEFAULTS[name]
        text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if value is not None else ""
        words.append(f"{name} {text or 'must be given'}")
    return words


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
    elif not method.fewest <= len(weights) <= (method.most or len(weights)):
        exactly = "exactly" if method.fewest == method.most else "at least"
        what = "models, the base among them" if method.base in (Base.FIRST, Base.MEMBER) else "experts"
        wanted = f"{exactly} {method.fewest} {what}" if method.fewest > 1 else "exactly one model"
        problems.append(f"{method.name} takes {wanted}, found {len(weights)}")
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
