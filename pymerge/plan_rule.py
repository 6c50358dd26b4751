"""The part of a plan that comes from the recipe alone: the rule, and which folder gives the side files."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TypeVar

from pymerge.blending import DEFAULTS
from pymerge.errors import ProblemList, PymergeError
from pymerge.methods import Base, Method, rule_for
from pymerge.recipe import ModelEntry, Recipe
from pymerge.rule import Rule, Scope, ThresholdTies, Trim

E = TypeVar("E", bound=Enum)


def is_same(a: Path, b: Path) -> bool:
    """Whether two paths mean the same file or folder."""
    return os.path.realpath(a) == os.path.realpath(b)


def donor_path(recipe: Recipe) -> Path:
    """The checkpoint whose configuration and tokenizer the output gets: the base, else the first model."""
    return recipe.base if recipe.base is not None else recipe.models[0].path


def rule_of(recipe: Recipe, method: Method, problems: list[str], notes: list[str]) -> Rule | None:
    """The rule of a recipe; problems and notes (what is given but not used) are added to the lists."""
    before = len(problems)
    if method.task_vector and recipe.base is None:
        problems.append(f"{method.name} needs base_model: the model that the experts were tuned from")
    if method.base is Base.FIRST and recipe.base is None:
        problems.append(f"{method.name} needs base_model: the model that t = 0 gives")
    experts = experts_of(recipe, method)
    if not experts:
        problems.append(f"models lists no expert beside the base {recipe.base}")
        return None
    weights = [recipe.parameter(entry, "weight") for entry in experts]
    for entry, weight in zip(experts, weights, strict=True):
        if weight is None and method.weighted:
            problems.append(f"{method.name} needs a weight for {entry.path}")
    _note_base(recipe, method, notes)
    densities = [recipe.parameter(entry, "density") for entry in experts]
    _note_unused(recipe, method, notes)
    given = recipe.parameters
    try:
        # A weight that is missing is taken as 1, so that the other numbers are judged all the same.
        rule = rule_for(
            method,
            weights=[_number(weight, 1.0) for weight in weights],
            densities=[_number(density, method.density) for density in densities],
            gammas=[_number(recipe.parameter(entry, "gamma"), method.gamma) for entry in experts],
            lambda_=_number(given.get("lambda"), 1.0),
            normalize=_flag(given.get("normalize")),
            rescale=_flag(given.get("rescale")),
            threshold_ties=_choice(given.get("threshold_ties"), ThresholdTies.FIRST),
            scope=_choice(given.get("scope"), Scope.TENSOR),
            seed=recipe.seed,
            names=[str(entry.path) for entry in experts],
            options={name: recipe.parameter(experts[0], name) for name in method.own},
            has_base=recipe.base is not None,
        )
        if rule.trim is not Trim.NONE and all(density >= 1 for density in rule.densities):
            notes.append(f"density is 1 for every expert, so {method.name} trims nothing")
        return rule if len(problems) == before else None
    except ProblemList as error:
        problems.extend(error.problems)
    except PymergeError as error:
        problems.append(str(error))
    return None


def experts_of(recipe: Recipe, method: Method) -> list[ModelEntry]:
    """The models that a method counts as experts, in its order; the base among them where it is one."""
    base = recipe.base
    if base is None or method.base is Base.UNUSED:
        return list(recipe.models)
    entry = next((listed for listed in recipe.models if is_same(listed.path, base)), None)
    if method.base is Base.MEMBER:
        return [*recipe.models, *([] if entry else [ModelEntry(base, {})])]
    others = [listed for listed in recipe.models if listed is not entry]
    return [entry or ModelEntry(base, {}), *others] if method.base is Base.FIRST else others


def _note_base(recipe: Recipe, method: Method, notes: list[str]) -> None:
    base = recipe.base
    if base is None:
        return
    listed = [entry for entry in recipe.models if is_same(entry.path, base)]
    if method.base is Base.UNUSED and not listed:
        notes.append(
            f"base_model {base} only gives the configuration: {method.name} averages what models lists"
        )
    if method.base in (Base.ORIGIN, Base.OPTIONAL_ORIGIN) and any(entry.parameters for entry in listed):
        notes.append(f"the parameters of {base} have no effect: it is the base, not an expert")


def _note_unused(recipe: Recipe, method: Method, notes: list[str]) -> None:
    given = set(recipe.parameters).union(*(entry.parameters for entry in recipe.models))
    unused = []
    if method.trim is Trim.NONE:
        unused += ["density", "rescale"]
    if method.trim is not Trim.OUTLIERS:
        unused.append("gamma")
    if not method.trim.by_magnitude:
        unused += ["scope", "threshold_ties"]
    if not method.task_vector or method.blend:
        unused.append("lambda")
    if method.blend or method.own:
        unused.append("normalize")
    if not method.weighted:
        unused.append("weight")
    unused += [name for name in DEFAULTS if name not in method.own]
    notes += [f"{name} has no effect with {method.name}" for name in unused if name in given]


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _choice(value: object, default: E) -> E:
    return value if isinstance(value, type(default)) else default
