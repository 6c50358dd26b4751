"""The part of a plan that comes from the recipe alone: whom it merges, and the rule of each tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypeVar

from pymerge.blending import DEFAULTS
from pymerge.errors import ProblemList, PymergeError, RecipeError
from pymerge.methods import METHODS, Base, Method
from pymerge.parameters import Case, Gradient, Scalar, cases_of, value_at
from pymerge.presets import PRESETS, adjusted, defaults_of
from pymerge.recipe import ModelEntry, Recipe, Slice
from pymerge.rule import Rule, Scope, Trim
from pymerge.ruling import rule_for
from pymerge.text import shown

E = TypeVar("E", bound=Enum)

# What may differ from expert to expert, and what holds for all of them.
OF_EXPERTS = ("weight", "density", "gamma", "epsilon", "scale")
OF_ALL = ("lambda", "normalize", "rescale", *(name for name in DEFAULTS if name != "scale"))


_ONE_MORE = "; it is the base_model, and as models does not list it, it is one more of them"


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of the output as a method takes it: experts, and apart the base that they are relative to.

    `where`: how messages call it; empty when it is the whole output. `copies`: its one expert is the result,
    whatever the method. `fewer`: it merges tensors that some of the recipe's models lack.
    """

    slice: Slice
    base: ModelEntry | None
    experts: tuple[ModelEntry, ...]
    where: str
    copies: bool = False
    fewer: bool = False

    @property
    def members(self) -> tuple[ModelEntry, ...]:
        """The base, if any, and the experts: a tensor's inputs in their order."""
        return (self.base, *self.experts) if self.base else self.experts


class Origin(NamedTuple):
    """What an output tensor is made of: part `part`, its members' tensors called `inputs`, at depth `t`."""

    name: str
    part: int
    t: float
    merges: bool
    inputs: tuple[str, ...]


def identity(path: Path) -> str:
    """What tells files and folders apart, however a recipe writes them."""
    return os.path.realpath(path)


def donor_path(recipe: Recipe) -> Path:
    """The checkpoint whose configuration and tokenizer the output gets: the base, else the first model."""
    path = recipe.base if recipe.base is not None else recipe.stack[0].sources[0].path
    return recipe.home(path)


def parts_of(recipe: Recipe, method: Method | None, problems: list[str], notes: list[str]) -> list[Part]:
    """The parts of the output; what the method needs and does not find is a problem."""
    parts = []
    for number, part in enumerate(recipe.stack):
        where = f"slices[{number}]" if recipe.slices else ""
        parts.append(_part(part, method, where, problems, notes))
    if method:
        _note_unused(recipe, method, notes)
        _note_preset(recipe, method, problems, notes)
    return parts


def _note_preset(recipe: Recipe, method: Method, problems: list[str], notes: list[str]) -> None:
    try:
        differs = defaults_of(recipe.preset, method.name).differs
    except RecipeError as error:
        problems.append(str(error))
    else:
        notes += [f"preset {recipe.preset.value}: {differs}"] if differs else []


def _part(part: Slice, method: Method | None, where: str, problems: list[str], notes: list[str]) -> Part:
    base = part.base
    role = Base.OPTIONAL_ORIGIN if method is None else method.base
    apart = role is Base.ORIGIN or (role is Base.OPTIONAL_ORIGIN and base is not None)
    of_base = base and identity(base)
    listed = base and next((entry for entry in part.sources if identity(entry.path) == of_base), None)
    if base is None:
        needs = {
            Base.ORIGIN: "the model that the experts were tuned from",
            Base.FIRST: "the model that t = 0 gives",
        }
        if method and role in needs:
            said = f"{method.name} needs base_model: {needs[role]}"
            problems.append(f"{where}: {said}" if where else said)
        return Part(part, None, part.sources, where)
    if role is Base.FIRST:
        others = tuple(entry for entry in part.sources if entry is not listed)
        return Part(part, None, (listed or ModelEntry(base, {}), *others), where)
    if not apart:
        # Without slices a base that is not listed is one more input, the last, as in mergekit.
        more = () if listed or where else (ModelEntry(base, {}),)
        return Part(part, None, (*part.sources, *more), where)
    experts = tuple(entry for entry in part.sources if entry is not listed)
    if role is Base.OPTIONAL_ORIGIN and method and len(experts) == 1:
        return Part(part, None, experts, where)  # one model is the result: nothing is relative to anything
    if listed and listed.parameters:
        notes.append(f"the parameters of {base} have no effect: it is the base, not an expert")
    if not listed and where:
        problems.append(f"{where}: sources must list the layers of the base {base} too")
    if not experts:
        what = f"{where}: sources list" if where else "models lists"
        problems.append(f"{what} no expert beside the base {base}")
    return Part(part, listed or ModelEntry(base, {}), experts, where)


def rules_of(
    recipe: Recipe, method: Method, parts: Sequence[Part], origins: Sequence[Origin], problems: list[str]
) -> list[Rule] | None:
    """The rule of each origin, equal ones being one object; None when there are problems, which are added."""
    before = len(problems)
    if method.name not in PRESETS.get(recipe.preset, METHODS):
        return None  # which is a problem of the parts
    rules: dict[Rule, Rule] = {}
    resolvers = [
        _Resolver(recipe, METHODS["passthrough"] if part.copies else method, part, rules, problems)
        for part in parts
        if part.experts
    ]
    for resolver in resolvers:
        if resolver.is_constant:  # which shows what is wrong with it even if no tensor is known
            resolver.rule(Origin("", 0, 0.0, True, ("",) * len(resolver.part.members)))
    if len(resolvers) < len(parts) or (origins and len(problems) > before):
        return None
    found = [resolvers[origin.part].rule(origin) for origin in origins]
    if len(problems) == before:
        _check_scope(parts, origins, found, problems)
    return found if len(problems) == before else None


class _Resolver:
    """Resolves the parameters of one part; tensors that all filters see alike at one depth share the work."""

    def __init__(
        self, recipe: Recipe, method: Method, part: Part, rules: dict[Rule, Rule], problems: list[str]
    ) -> None:
        self.part = part
        self._recipe, self._method, self._rules, self._problems = recipe, method, rules, problems
        self._defaults = defaults_of(recipe.preset, method.name)
        scopes = [recipe.scopes(part.slice, entry) for entry in part.experts]
        self._each = {name: [cases_of(scope, name) for scope in scopes] for name in OF_EXPERTS}
        self._all = {name: cases_of(recipe.scopes(part.slice), name) for name in OF_ALL}
        cases = [case for given in self._given() for case in given]
        self._filters = list(dict.fromkeys(case.filter for case in cases if not case.takes_all))
        self.is_constant = not self._filters and not any(isinstance(case.value, Gradient) for case in cases)
        self._found: dict[object, Rule] = {}
        self._said: set[str] = set()

    def _given(self) -> Iterable[tuple[Case, ...]]:
        yield from self._all.values()
        for cases in self._each.values():
            yield from cases

    def rule(self, origin: Origin) -> Rule:
        """The rule of one tensor; where it has problems they are added, and some rule is given."""
        key: object = None
        if not self.is_constant:
            names = dict.fromkeys((origin.name, *origin.inputs)) if self._filters else ()
            key = (origin.t, tuple([filter_ in name for name in names for filter_ in self._filters]))
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._resolved(origin)
        return found

    def _resolved(self, origin: Origin) -> Rule:
        inputs = origin.inputs[1:] if self.part.base else origin.inputs
        each = {
            name: [value_at(c, tensor, origin.t) for c, tensor in zip(cases, inputs, strict=True)]
            for name, cases in self._each.items()
        }
        all_ = {name: value_at(cases, origin.name, origin.t) for name, cases in self._all.items()}
        top, method, defaults = self._recipe.parameters, self._method, self._defaults
        options = {name: each["scale"][0] if name == "scale" else all_[name] for name in method.own}
        if self.part.fewer and "votes" in options:
            votes = options["votes"]
            most = len(self.part.experts)  # more cannot claim an entry
            options["votes"] = min(_number(votes, float(DEFAULTS["votes"] or 0)), most)
        place = "" if self.is_constant else f" (tensor {shown(origin.name)})"
        for entry, weight in zip(self.part.experts, each["weight"], strict=True):
            if weight is None and method.weighted and defaults.weight is None:
                more = "" if entry in self.part.slice.sources else _ONE_MORE
                self._say(f"{method.name} needs a weight for {entry.path}{more}", place)
        try:
            # A weight that is missing is taken as 1, so that the other numbers are judged all the same.
            density = method.density if defaults.density is None else defaults.density
            densities = [_number(given, density) for given in each["density"]]
            normalize = _flag(all_["normalize"])
            made = adjusted(
                defaults,
                [_number(weight, 1.0) for weight in each["weight"]],
                densities,
                _flag(all_["rescale"]),
            )
            rule = rule_for(
                method,
                weights=made.weights,
                densities=densities,
                gammas=[_number(gamma, method.gamma) for gamma in each["gamma"]],
                epsilons=[_number(epsilon, method.epsilon) for epsilon in each["epsilon"]],
                lambda_=_number(all_["lambda"], defaults.lambda_),
                normalize=defaults.normalize if normalize is None else normalize,
                rescale=made.rescale,
                threshold_ties=_choice(top.get("threshold_ties"), defaults.threshold_ties),
                scope=_choice(top.get("scope"), defaults.scope),
                one_more=defaults.one_more,
                late_weights=made.late_weights,
                seed=self._recipe.seed,
                names=[str(entry.path) for entry in self.part.experts],
                options=options,
                has_base=self.part.base is not None,
            )
        except ProblemList as error:
            for problem in error.problems:
                self._say(problem, place)
        except PymergeError as error:
            self._say(str(error), place)
        else:
            return self._rules.setdefault(rule, rule)
        return rule_for(METHODS["linear"], weights=[1.0] * len(self.part.experts))

    def _say(self, problem: str, place: str) -> None:
        """A problem once, not for every number that a gradient passes through."""
        subject = problem.partition(" is ")[0].partition(" sum to ")[0]
        if subject not in self._said:
            self._said.add(subject)
            self._problems.append(problem + place)


def _check_scope(
    parts: Sequence[Part], origins: Sequence[Origin], rules: Sequence[Rule], problems: list[str]
) -> None:
    """One threshold for each expert over all tensors needs one rule for all."""
    merged = [(origin, rule) for origin, rule in zip(origins, rules, strict=True) if origin.merges]
    if not merged or merged[0][1].scope is not Scope.MODEL:
        return
    if len(parts) > 1:
        what = "several slices" if parts[0].where else "tensors that some of them lack"
        problems.append(
            f"scope: model takes each expert's entries over the whole model, which {what} do not have;"
            " use scope: tensor"
        )
        return
    first, rule = merged[0]
    for origin, other in merged:
        if other is not rule:
            names = [field.name for field in fields(Rule)]
            differs = [n.rstrip("_") for n in names if getattr(rule, n) != getattr(other, n)]
            problems.append(
                f"scope: model needs the same parameters for all tensors, but {' and '.join(differs)} of"
                f" {shown(first.name)} and {shown(origin.name)} differ; use scope: tensor"
            )
            return


def _note_unused(recipe: Recipe, method: Method, notes: list[str]) -> None:
    scopes = [recipe.parameters, recipe.module]
    scopes += [part.parameters for part in recipe.slices]
    scopes += [entry.parameters for part in recipe.stack for entry in part.sources]
    given = set().union(*scopes)
    unused = []
    if not method.dense:
        unused += ["density", "rescale"]
    if method.trim is not Trim.OUTLIERS:
        unused.append("gamma")
    if not method.trim.by_magnitude:
        unused += ["scope", "threshold_ties"]
    if not method.scales:
        unused.append("lambda")
    if method.blend or method.fuse or method.own:
        unused.append("normalize")
    if not method.weighted:
        unused.append("weight")
    ranked = ("epsilon",) if method.trim is Trim.RANKED else ()
    unused += [name for name in DEFAULTS if name not in (*method.own, *ranked)]
    notes += [f"{name} has no effect with {method.name}" for name in unused if name in given]


def _number(value: Scalar | None, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _flag(value: Scalar | None) -> bool | None:
    return value if isinstance(value, bool) else None


def _choice(value: object, default: E) -> E:
    return value if isinstance(value, type(default)) else default
