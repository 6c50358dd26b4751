"""The rule that the options of the in-memory API amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any, SupportsFloat, SupportsIndex

from pymerge.errors import ProblemList, RecipeError
from pymerge.methods import Base, Method
from pymerge.options import PerExpert, as_count, as_flag, as_member, as_number, per_expert
from pymerge.parameters import Preset
from pymerge.presets import adjusted, defaults_of
from pymerge.rule import Rule, Scope, ThresholdTies
from pymerge.ruling import rule_for


def rule_of(
    row: Method,
    count: int,
    has_base: bool,
    *,
    preset: str = "mergekit",
    weight: PerExpert | None = None,
    density: PerExpert | None = None,
    gamma: PerExpert | None = None,
    epsilon: PerExpert | None = None,
    lambda_: SupportsFloat | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    threshold_ties: str | None = None,
    scope: str | None = None,
    seed: SupportsIndex = 0,
    t: SupportsFloat | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    normalize_weights: bool = True,
    eps: SupportsFloat = 1e-8,
    max_iter: SupportsIndex = 10,
    tol: SupportsFloat = 1e-5,
    filter_wise: bool = False,
    scale: SupportsFloat = 1.0,
    r: SupportsFloat = 0.1,
    alpha: SupportsFloat = 0.2,
    select_topk: SupportsFloat = 1.0,
    claim: SupportsFloat = 0.4,
    votes: SupportsIndex = 2,
) -> Rule:
    """The rule of a method for `count` experts; the options are those of `merge_tensors`. RecipeError."""
    options: dict[str, object] = {
        "t": None if t is None else as_number(t, "t"),
        "nuslerp_flatten": as_flag(nuslerp_flatten, "nuslerp_flatten"),
        "nuslerp_row_wise": as_flag(nuslerp_row_wise, "nuslerp_row_wise"),
        "normalize_weights": as_flag(normalize_weights, "normalize_weights"),
        "eps": as_number(eps, "eps"),
        "max_iter": as_count(max_iter, "max_iter"),
        "tol": as_number(tol, "tol"),
        "filter_wise": as_flag(filter_wise, "filter_wise"),
        "scale": as_number(scale, "scale"),
        "r": as_number(r, "r"),
        "alpha": as_number(alpha, "alpha"),
        "select_topk": as_number(select_topk, "select_topk"),
        "claim": as_number(claim, "claim"),
        "votes": as_count(votes, "votes"),
    }
    if "epsilon" in row.own and epsilon is not None:
        options["epsilon"] = as_number(epsilon, "epsilon")
    if not row.weighted:
        weight, density = None, None
    defaults = defaults_of(as_member(Preset, preset, "preset"), row.name)
    densities = per_expert(_first(density, defaults.density, row.density), count, "density")
    made = adjusted(
        defaults,
        per_expert(_first(weight, 1.0), count, "weight"),
        densities,
        as_flag(rescale, "rescale"),
    )
    try:
        return rule_for(
            row,
            weights=made.weights,
            densities=densities,
            gammas=None if gamma is None else per_expert(gamma, count, "gamma"),
            epsilons=None if epsilon is None else per_expert(epsilon, count, "epsilon"),
            options=options,
            has_base=has_base,
            lambda_=as_number(_first(lambda_, defaults.lambda_), "lambda_"),
            normalize=as_flag(_first(normalize, defaults.normalize), "normalize"),
            rescale=made.rescale,
            threshold_ties=as_member(
                ThresholdTies, _first(threshold_ties, defaults.threshold_ties), "threshold_ties"
            ),
            scope=as_member(Scope, _first(scope, defaults.scope), "scope"),
            seed=as_count(seed, "seed"),
            one_more=defaults.one_more,
            late_weights=made.late_weights,
        )
    except ProblemList as several:
        raise RecipeError(several.problems[0]) from None


def members_of(row: Method, base: object | None, experts: list[Any]) -> list[Any]:
    """The experts as the method counts them: with the base where it is one of them."""
    if row.base is Base.FIRST and base is None:
        raise RecipeError(f"{row.name} needs a base: the tensors that t = 0 gives")
    if base is None or row.base not in (Base.FIRST, Base.MEMBER):
        return experts
    return [base, *experts] if row.base is Base.FIRST else [*experts, base]


def _first(*given: object) -> object:
    """The first that is not None; None where all are."""
    return next((value for value in given if value is not None), None)


# Options of `merge_tensors` that say what a merge is.
OPTIONS = tuple(
    name for name, about in signature(rule_of).parameters.items() if about.kind is about.KEYWORD_ONLY
)
# As recipes call it.
LAMBDA = "lambda"


def known_options(options: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, Any]:
    """The options by the names of `merge_tensors`; RecipeError for one that neither it nor `more` knows."""
    known = (*OPTIONS, *more)
    for name in options:
        if name not in known and name != LAMBDA:
            near = get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"{name!r} is not an option of a merge{hint}")
    return {"lambda_" if name == LAMBDA else name: value for name, value in options.items()}
