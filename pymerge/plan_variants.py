"""Plans of one recipe with other numbers: what a sweep merges together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pymerge.checkpoint.manifest import MANIFEST_NAME, PLAN_NAME
from pymerge.checkpoint.staging import PARTIAL
from pymerge.errors import ProblemList, PymergeError
from pymerge.plan_checks import free_bytes
from pymerge.planner import Plan, plan_or_find
from pymerge.recipe import Document
from pymerge.sweep_settings import Setting, folder_name, plain, with_setting, wrong_settings
from pymerge.text import shown

LONGEST_NAME = 255  # bytes, of a folder


class Variant(NamedTuple):
    """One output of a sweep: its parameters, its name within the sweep's folder, and its plan.

    `out`: None where nothing about the output was planned. `done`: the merge lies there already.
    """

    setting: Setting
    name: str
    plan: Plan
    out: Path | None
    done: bool


def plan_variants(
    document: Document, settings: Sequence[Setting], out: Path | None, **options: Any
) -> tuple[Variant, ...]:
    """The plans of one recipe with each of `settings`, each into a folder of `out` that is named after it.

    A parameter of a setting holds for all models and layers, and whatever the recipe gives under that name is
    dropped; `weight@NAME` holds for the model of that name. `options`: as `make_plan` takes them. Raises
    ProblemList with the problems of all settings.
    """
    problems = list(dict.fromkeys(wrong_settings(settings)))
    if out is not None and any(os.path.lexists(out / name) for name in (MANIFEST_NAME, PLAN_NAME)):
        problems.append(f"{out} is a merge; a sweep wants a folder of its own for its outputs")
    if problems:
        raise ProblemList(problems)
    settings = [plain(setting) for setting in settings]
    names = [folder_name(setting) for setting in settings]
    problems += _wrong_names(settings, names)
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


def _wrong_names(settings: Sequence[Setting], names: Sequence[str]) -> Iterator[str]:
    """Every output needs a folder of its own."""
    first: dict[str, Setting] = {}
    for setting, name in zip(settings, names, strict=True):
        other = first.setdefault(name, setting)
        if other is not setting:
            what = "are the same" if other == setting else "would have the same folder"
            yield f"two settings of the sweep {what}: {name}"
        elif len((name + PARTIAL).encode()) > LONGEST_NAME:
            yield f"a setting of the sweep is too long for the name of a folder: {shown(name)}"


def _variant(
    document: Document, setting: Setting, out: Path | None, name: str, options: Mapping[str, Any]
) -> Variant:
    plan, done = plan_or_find(with_setting(document, setting).draft(), out, **options)
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
