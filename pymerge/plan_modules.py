"""Modules: parts of a model, such as its language model and its vision tower, that are merged apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pymerge.methods import Method
from pymerge.plan_checks import NAMED, Input, check_tensors, check_working_types
from pymerge.plan_optional import lacked, reduced
from pymerge.plan_rule import Origin, Part, identity, parts_of, rules_of
from pymerge.plan_stack import Outline, stacked, whole
from pymerge.plan_text import uses_gradients
from pymerge.recipe import Recipe
from pymerge.rule import Rule, Scope
from pymerge.text import shown


def inputs_of_modules(
    recipe: Recipe, parts: Sequence[Sequence[Part]], inputs: Mapping[str, Input], problems: list[str]
) -> list[dict[str, Input]]:
    """For each module, the inputs of its parts with no tensors but those below its name.

    A tensor is below a name that its own begins with, or has after its first component: model.vision_tower.x
    is below vision_tower. One that is below none, or several, is a problem.
    """
    if not recipe.modules:
        return [dict(inputs)]
    owners: dict[str, str] = {}
    for source in inputs.values():
        wrong = []
        for name in source.checkpoint.tensors:
            if name not in owners:
                found = [module for module in recipe.modules if _is_below(name, module)]
                owners[name] = found[0] if len(found) == 1 else ""
                if not owners[name]:
                    wrong.append(f"{shown(name)} of {source.label} is below {' and '.join(found) or 'none'}")
        more = (
            [f"{len(wrong) - NAMED:,} more tensors are not below one alone either"]
            if len(wrong) > NAMED
            else []
        )
        problems += [f"modules: {text}, expected one module" for text in wrong[:NAMED]]
        problems += [f"modules: {text}" for text in more]
    return [
        {
            key: _restricted(inputs[key], owners, name)
            for key in dict.fromkeys(identity(entry.path) for part in some for entry in part.members)
            if key in inputs
        }
        for name, some in zip(recipe.modules, parts, strict=True)
    ]


def _is_below(name: str, module: str) -> bool:
    return f".{name}.".startswith(f".{module}.") or name.partition(".")[2].startswith(f"{module}.")


def _restricted(source: Input, owners: Mapping[str, str], module: str) -> Input:
    tensors = {name: ref for name, ref in source.checkpoint.tensors.items() if owners.get(name) == module}
    return source._replace(checkpoint=source.checkpoint._replace(tensors=tensors))


class Merged(NamedTuple):
    """What the parts of the output are made of, and how.

    `main`: the parts without those for tensors that some inputs lack. `members`: the inputs of each part.
    `rules`: one for each origin of the outline; None where there are problems.
    """

    parts: Sequence[Part]
    main: Sequence[Part]
    members: Sequence[Sequence[Input]]
    outline: Outline
    rules: Sequence[Rule] | None


def parts_of_modules(
    recipe: Recipe, method: Method | None, problems: list[str], notes: list[str]
) -> list[list[Part]]:
    """The parts of each module; what the method needs and does not find is a problem."""
    found = []
    for name, module in recipe.split:
        with _placed(name, problems, notes) as (said, noted):
            found.append(parts_of(module, method, said, noted))
    if recipe.modules and recipe.parameters.get("scope") is Scope.MODEL:
        problems.append("scope: model knows of no modules, which are merged apart; use scope: tensor")
    return found


def examine_modules(
    recipe: Recipe,
    method: Method | None,
    parts: Sequence[list[Part]],
    inputs: Mapping[str, Input],
    problems: list[str],
    notes: list[str],
) -> Merged:
    """All modules together; problems and notes are added."""
    found = []
    split = zip(recipe.split, parts, inputs_of_modules(recipe, parts, inputs, problems), strict=True)
    for (name, module), some, own in split:
        with _placed(name, problems, notes) as (said, noted):
            found.append(_examine(module, method, some, own, said, noted))
    return found[0] if len(found) == 1 else _joined(list(recipe.modules), found, notes)


def _examine(
    recipe: Recipe,
    method: Method | None,
    parts: list[Part],
    inputs: Mapping[str, Input],
    problems: list[str],
    notes: list[str],
) -> Merged:
    count = len(parts)
    members, outline = _outline(recipe, method, parts, inputs, problems, notes)
    rules = rules_of(recipe, method, parts, outline.origins, problems) if method else None
    if rules and rules[0].scope is Scope.MODEL:
        check_working_types(members[0], recipe.dtype, problems)
    return Merged(parts, parts[:count], members, outline, rules)


def _joined(names: Sequence[str], modules: Sequence[Merged], notes: list[str]) -> Merged:
    parts: list[Part] = []
    members: list[Sequence[Input]] = []
    origins: list[Origin] = []
    for name, module in zip(names, modules, strict=True):
        origins += [origin._replace(part=origin.part + len(parts)) for origin in module.outline.origins]
        parts += module.parts
        members += module.members
        if module.outline.layers:
            count = len(module.outline.layers)
            notes.append(f"modules.{name}: has {count} layers now; config.json is left as it is")
    rules = [rule for module in modules for rule in module.rules or ()]
    whole = all(module.rules is not None for module in modules)
    return Merged(
        parts,
        [part for module in modules for part in module.main],
        members,
        Outline(origins, [count for module in modules for count in module.outline.counts]),
        rules if whole else None,
    )


@contextmanager
def _placed(name: str, problems: list[str], notes: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Lists for what is said of one module, which is then added with its name."""
    if not name:
        yield problems, notes
        return
    said: list[str] = []
    noted: list[str] = []
    yield said, noted
    problems += [f"modules.{name}: {text}" for text in said]
    notes += [f"modules.{name}: {text}" for text in noted]


def _outline(
    recipe: Recipe,
    method: Method | None,
    parts: list[Part],
    inputs: Mapping[str, Input],
    problems: list[str],
    notes: list[str],
) -> tuple[list[list[Input]], Outline]:
    """The inputs of each part, and the output; nothing of it where anything is wrong with them.

    Parts for the tensors that some inputs lack are added.
    """
    before = len(problems)
    if not recipe.slices:
        readable = list(inputs.values())
        complete = len(readable) == len(parts[0].members)
        lacking = lacked(readable) if method and complete else {}
        names = check_tensors(readable, {row[0] for row in lacking}, problems)
        if not readable or not complete or len(problems) > before:
            return [readable], Outline()
        more = reduced(method, parts[0], readable, lacking, problems, notes) if method else []
        parts += [some.part for some in more]
        members = [readable, *(some.holders for some in more)]
        if len(problems) > before:
            return [readable], Outline()
        listed = [names, *([row[0] for row in some.rows] for some in more)]
        return members, whole(listed, members, uses_gradients(recipe))
    if problems or any(identity(entry.path) not in inputs for part in parts for entry in part.members):
        return [], Outline()
    members = [[inputs[identity(entry.path)] for entry in part.members] for part in parts]
    return members, stacked(method, parts, members, problems, notes)
