"""Plans of one recipe with other numbers: what a sweep merges together."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from pymerge.checkpoint.manifest import MANIFEST_NAME, PLAN_NAME, check_finished
from pymerge.errors import ProblemList, PymergeError, RecipeError
from pymerge.plan_checks import free_bytes
from pymerge.planner import Plan, make_plan
from pymerge.recipe import Document
from pymerge.text import shown

Value: TypeAlias = "float | bool | str"
# The parameters that one output is merged with, instead of the recipe's.
Setting: TypeAlias = Mapping[str, Value]

SEED = "seed"  # stands beside the parameters, not among them
# Of the in-memory API, where lambda is a word of the language.
SPELLINGS = MappingProxyType({"lambda_": "lambda"})
# What a value in words may consist of, as it becomes part of a folder's name.
WORD = re.compile(r"[a-z_]+", re.ASCII)


class Variant(NamedTuple):
    """One output of a sweep: its parameters, its name within the sweep's folder, and its plan.

    `out`: None where nothing about the output was planned. `done`: the merge lies there already.
    """

    setting: Setting
    name: str
    plan: Plan
    out: Path | None
    done: bool


def grid(values: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last parameter's changing fastest. Raises RecipeError."""
    for name, some in values.items():
        if isinstance(some, (str, bytes)) or not isinstance(some, Iterable):
            raise RecipeError(f"{name} of the sweep is {some!r}, expected a list of values")
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


def settings_of(given: object) -> list[dict[str, Any]]:
    """The settings of a sweep: those given, or every combination of the values given. Raises RecipeError."""
    if isinstance(given, Mapping):
        return grid(given)
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RecipeError(f"the settings of the sweep are {given!r}, expected values for each parameter")
    settings = list(given)
    for setting in settings:
        if not isinstance(setting, Mapping):
            raise RecipeError(f"a setting of the sweep is {setting!r}, expected a value for each parameter")
    return [dict(setting) for setting in settings]


def plan_sweep(
    document: Document, settings: Sequence[Setting], out: Path | None, **options: Any
) -> tuple[Variant, ...]:
    """The plans of one recipe with each of `settings`, each into a folder of `out` that is named after it.

    A parameter of a setting holds for all models and layers: whatever the recipe gives under that name is
    dropped. `options`: as `make_plan` takes them. Raises ProblemList with the problems of all settings.
    """
    problems = list(_wrong_settings(settings))
    if out is not None and any(os.path.lexists(out / name) for name in (MANIFEST_NAME, PLAN_NAME)):
        problems.append(f"{out} is a merge; a sweep wants a folder of its own for its outputs")
    if problems:
        raise ProblemList(problems)
    settings = [_plain(setting) for setting in settings]
    names = [_name(setting) for setting in settings]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"two settings of the sweep are the same: {name}")
    if problems:
        raise ProblemList(problems)
    variants: list[Variant] = []
    for setting, name in zip(settings, names, strict=True):
        try:
            variants.append(_variant(document, setting, None if out is None else out / name, name, options))
        except PymergeError as error:
            said = error.problems if isinstance(error, ProblemList) else (str(error),)
            # What is wrong with the recipe itself is wrong with every setting.
            problems += [text for text in said if text not in problems]
    if not problems:
        problems += [*_unlike(variants), *_without_effect(variants), *_lacking_space(variants, out)]
    if problems:
        raise ProblemList(problems)
    return tuple(variants)


def _variant(
    document: Document, setting: Setting, out: Path | None, name: str, options: Mapping[str, Any]
) -> Variant:
    done = out is not None and os.path.lexists(out)
    plan = make_plan(_with_setting(document, setting).draft(), None if done else out, **options)
    if done and out is not None:
        check_finished(out, plan.digest())
    return Variant(setting, name, plan, out, done)


def _lacking_space(variants: Sequence[Variant], out: Path | None) -> Iterator[str]:
    """All outputs must fit together; that each fits alone its plan has checked."""
    waiting = [variant for variant in variants if not variant.done]
    if out is None or not waiting:
        return
    free = free_bytes(out)
    begun = sum(free_bytes(variant.out) - free for variant in waiting if variant.out)
    needed = sum(variant.plan.disk_bytes for variant in waiting)
    if needed > free + begun:
        yield f"the sweep needs {needed:,} bytes of disk space in {out}, {free + begun:,} are free"


def _name(setting: Setting) -> str:
    """What the setting's folder is called: density0.2-lambda1."""
    return "-".join(f"{key}{_in_name(value)}" for key, value in setting.items())


def _in_name(value: Value) -> str:
    if isinstance(value, (bool, str)):
        return f"-{value}".lower()
    return repr(value).removesuffix(".0")


def _plain(setting: Setting) -> dict[str, Value]:
    """The setting with Python's own numbers (numpy's are none that YAML knows) and the recipe's names."""
    return {
        SPELLINGS.get(key, key): value if isinstance(value, (bool, str)) else _number(value)
        for key, value in setting.items()
    }


def _number(value: float) -> float:
    """Whole ones stay whole: a seed may have more digits than a float."""
    return int(value) if isinstance(value, Integral) else float(value)


def _wrong_settings(settings: Sequence[Setting]) -> Iterator[str]:
    if not settings:
        yield "a sweep needs at least one setting"
    for setting in settings:
        if not setting:
            yield "a setting of the sweep changes no parameter"
        for key, value in setting.items():
            if not isinstance(key, str) or not key.isidentifier():
                yield f"{shown(str(key))} cannot be the name of a parameter"
            elif not _is_value(value):
                yield f"{key} of a setting is {value!r}, expected a finite number, true, false or a word"


def _is_value(value: object) -> bool:
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    try:
        return isinstance(value, bool) or (isinstance(value, Real) and math.isfinite(value))
    except OverflowError:  # a whole number that is no float
        return False


def _unlike(variants: Sequence[Variant]) -> Iterator[str]:
    """Outputs are merged together, so all must be made of the same tensors in the same files."""
    first = variants[0]
    for other in variants[1:]:
        if other.plan.scope is not first.plan.scope:
            yield f"{other.name} and {first.name} differ in scope; such settings need merges of their own"
        elif other.plan.layouts != first.plan.layouts:
            yield (
                f"with {other.name} other tensors are written than with {first.name};"
                " such settings need merges of their own"
            )


def _without_effect(variants: Sequence[Variant]) -> Iterator[str]:
    """Outputs with the same rules would be copies of each other."""
    first: dict[tuple[object, ...], str] = {}
    for variant in variants:
        rules = tuple(replace(rule, seed=0) if not rule.trim.drawn else rule for rule in variant.plan.rules)
        other = first.setdefault(rules, variant.name)
        if other != variant.name:
            yield (
                f"{variant.plan.method.name} does the same with {variant.name} as with {other}:"
                " what differs has no effect on it"
            )


def _with_setting(document: Document, setting: Setting) -> Document:
    """The document as if it had been written with the setting's parameters."""
    from pymerge.recipe_yaml import write_yaml

    value = document.value
    if not isinstance(value, dict):
        return document  # which its draft will say
    parameters = {key: number for key, number in setting.items() if key != SEED}
    try:
        changed = _without(value, frozenset(parameters))
    except RecursionError:
        raise RecipeError("the recipe contains itself, by an alias within its anchor") from None
    if SEED in setting:
        changed[SEED] = _seed(setting[SEED])
    if parameters:
        given = changed.get("parameters") or {}
        if not isinstance(given, dict):
            return document
        changed["parameters"] = {**given, **parameters}
    text = write_yaml(changed)
    return document._replace(text=text, value=changed)


def _seed(value: Value) -> int:
    if isinstance(value, (bool, str)) or value != int(value):
        raise RecipeError(f"seed of a setting is {value!r}, expected a whole number")
    return int(value)


def _without(value: Any, names: frozenset[str]) -> Any:
    """A copy without what any `parameters` give under these names."""
    if isinstance(value, list):
        return [_without(entry, names) for entry in value]
    if not isinstance(value, dict):
        return value
    copy = {}
    for key, entry in value.items():
        if key == "parameters" and isinstance(entry, dict):
            copy[key] = {name: given for name, given in entry.items() if name not in names}
        else:
            copy[key] = _without(entry, names)
    return copy
