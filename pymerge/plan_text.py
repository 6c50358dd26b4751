"""A plan's parameters in words: what each model is given, what varies from layer to layer, what surprises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pymerge.blending import DEFAULTS
from pymerge.explaining import normalizes
from pymerge.job import TensorJob
from pymerge.methods import Base, Method
from pymerge.parameters import EVERY, Case, Conditional, Gradient, Scalar, cases_of
from pymerge.plan_layers import depth
from pymerge.plan_rule import OF_ALL, Origin, Part
from pymerge.presets import KEEPS_ONE, defaults_of
from pymerge.recipe import ModelEntry, Recipe
from pymerge.rule import Rule, Trim
from pymerge.text import printable, shown


def describe_parts(recipe: Recipe, method: Method, parts: Sequence[Part], counts: Sequence[int]) -> list[str]:
    """Base, experts and what varies, one line each; `counts`: each part's layers, 0 where none are known."""
    lines = []
    defaults = _defaults_of_experts(recipe, method)
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if part.where:
            begin = sum(counts[:number])
            lines.append(f"slice        {number}, layers {begin} to {begin + count - 1} of the output")
        for entry in part.members:
            of = f", its layers {entry.layers.start} to {entry.layers.stop - 1}" if entry.layers else ""
            path = printable(str(entry.path))
            role = role_of(method, part, entry)
            if role != "expert":
                lines.append(f"{role:<12} {path}{of}{' (t = 0)' if role == 'start' else ''}")
                continue
            scopes = recipe.scopes(part.slice, entry)
            given = [
                f"{name} {_stated(cases_of(scopes, name), default, count)}"
                for name, default in defaults.items()
            ]
            stated = f" ({', '.join(given)})" if given else ""
            lines.append(f"expert       {path}{of}{stated}")
        for name in OF_ALL:
            cases = cases_of(recipe.scopes(part.slice), name)
            varies = len(cases) > 1 or any(isinstance(case.value, Gradient) for case in cases)
            if varies or (cases and parts[1:]):
                lines.append(f"{name:<12} {_stated(cases, None, count)}")
    if count := max(counts, default=0) if uses_gradients(recipe) else 0:
        among = " in the longest stack" if not recipe.slices else " in the longest slice" if parts[1:] else ""
        lines.append(
            f"layers       {count}{among}; a .. b .. c are the values in the first, the middle and the last"
            " layer, other tensors take the first"
        )
    return lines


def role_of(method: Method, part: Part, entry: ModelEntry) -> str:
    """What a model is to a method: base, start (of an arc) or expert."""
    if entry is part.base:
        return "base"
    return "start" if method.base is Base.FIRST and entry is part.experts[0] else "expert"


def _defaults_of_experts(recipe: Recipe, method: Method) -> dict[str, float | None]:
    """The parameters that each expert has with a method, and what they are where a recipe is silent."""
    preset = defaults_of(recipe.preset, method.name)
    found: dict[str, float | None] = {"weight": preset.weight} if method.weighted else {}
    if method.dense:
        found["density"] = method.density if preset.density is None else preset.density
    if method.trim is Trim.OUTLIERS:
        found["gamma"] = method.gamma
    if method.trim is Trim.RANKED:
        found["epsilon"] = method.epsilon
    return found


def parameters_of(recipe: Recipe, method: Method, parts: Sequence[Part]) -> list[dict[str, object]]:
    """What each part of the output is given, defaults filled in, JSON-ready: a number or flag, a list over
    the layers, or a list of cases, each with a filter ("*": all tensors) and a value.
    """
    preset = defaults_of(recipe.preset, method.name)
    each = _defaults_of_experts(recipe, method)
    shared: dict[str, Scalar | None] = {name: DEFAULTS[name] for name in method.own}
    if method.scales:
        shared["lambda"] = preset.lambda_
    if normalizes(method):
        shared["normalize"] = method.normalize if preset.normalize is None else preset.normalize
    if method.dense:
        shared["rescale"] = method.rescale and not preset.by_density
    found = []
    for part in parts:
        models = []
        for entry in part.members:
            role = role_of(method, part, entry)
            scopes = recipe.scopes(part.slice, entry)
            layers = {"layers": [entry.layers.start, entry.layers.stop]} if entry.layers else {}
            numbers = {} if role == "base" else {n: _plain(cases_of(scopes, n), d) for n, d in each.items()}
            models.append({"model": str(entry.path), "role": role, **layers, **numbers})
        scopes = recipe.scopes(part.slice)
        numbers = {name: _plain(cases_of(scopes, name), default) for name, default in shared.items()}
        found.append({"models": models, **numbers})
    return found


def _plain(cases: Sequence[Case], default: Scalar | None) -> object:
    """Cases as JSON has them."""
    given = [
        (case.filter, list(case.value.values) if isinstance(case.value, Gradient) else case.value)
        for case in cases
    ]
    if default is not None and not any(case.takes_all for case in cases):
        given.append((EVERY, default))
    if [filter_ for filter_, _ in given] == [EVERY]:
        return given[0][1]
    return [{"filter": filter_, "value": value} for filter_, value in given] or None


def _stated(cases: Sequence[Case], default: float | None, count: int) -> str:
    said = []
    for case in cases:
        label = "else" if case.takes_all else shown(case.filter)
        value = _value(case.value, count)
        said.append(value if case.takes_all and len(cases) == 1 else f"{label}: {value}")
    if not said:
        return "default" if default is None else f"{default:g}"
    if not cases[-1].takes_all:
        said.append("else: default" if default is None else f"else: {default:g}")
    return said[0] if len(said) == 1 else f"[{'; '.join(said)}]"


def _value(value: Scalar | Gradient, count: int) -> str:
    if not isinstance(value, Gradient):
        return _scalar(value)
    indices = dict.fromkeys((0, count // 2, count - 1)) if count else (0,)
    return " .. ".join(_scalar(value.at(depth(index, count) if count else 0.0)) for index in indices)


def _scalar(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def uses_gradients(recipe: Recipe) -> bool:
    """Whether any parameter depends on the layer."""
    return any(isinstance(case.value, Gradient) for _, cases in _stated_parameters(recipe) for case in cases)


def notes_of(recipe: Recipe, origins: Sequence[Origin]) -> Iterator[str]:
    """What the parameters say that no tensor hears."""
    names = dict.fromkeys(name for origin in origins for name in {origin.name, *origin.inputs})
    said: dict[str, None] = {}
    for name, cases in _stated_parameters(recipe):
        for number, case in enumerate(cases):
            if not (case.takes_all or case.filter in said or any(case.takes(tensor) for tensor in names)):
                said[case.filter] = None
                yield f"{name}: the filter {shown(case.filter)} matches no tensor"
            if case.takes_all and number + 1 < len(cases):
                yield f"{name}: what follows the case for all tensors has no effect"
                break
    if uses_gradients(recipe) and not any(origin.t for origin in origins):
        yield "no tensor's name has the number of a layer in it, so every gradient gives its first value"


def notes_of_rules(rules: Iterable[Rule]) -> Iterator[str]:
    """Rules that keep nothing."""
    for trim in dict.fromkeys(rule.trim for rule in rules if rule.trim is not Trim.NONE):
        if (
            any(rule.trim is trim and not any(rule.densities) for rule in rules)
            and trim is not Trim.IMPORTANCE
        ):
            name = "select_topk" if trim is Trim.VARIANCE else "density"
            yield f"{name} 0 keeps nothing, so the base stays as it is where it holds"


def notes_of_jobs(recipe: Recipe, method: Method, jobs: Iterable[Sequence[TensorJob]]) -> Iterator[str]:
    """Tensors so small that the preset's authors would keep nothing of them."""
    if not defaults_of(recipe.preset, method.name).keeps_one:
        return
    merged = ((job, job.rule) for shard in jobs for job in shard if job.rule is not None and job.count)
    small = [
        job.name for job, rule in merged if any(d > 0 and int(d * job.count) == 0 for d in rule.densities)
    ]
    if small:
        yield f"preset {recipe.preset.value}: {KEEPS_ONE} (tensor {shown(small[0])})"


def _stated_parameters(recipe: Recipe) -> Iterator[tuple[str, tuple[Case, ...]]]:
    """Every parameter wherever it is given, as cases."""
    scopes = [recipe.parameters, *(module.module for _, module in recipe.split)]
    for part in recipe.stack:
        scopes += [part.parameters, *(entry.parameters for entry in part.sources)]
    for scope in scopes:
        for name, given in scope.items():
            yield name, given.cases if isinstance(given, Conditional) else (Case(EVERY, given),)
