"""From the names that a recipe gives its models to files and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.adapted import Adapted
from pymerge.errors import RecipeError
from pymerge.hub import fetch, is_hub_name

if TYPE_CHECKING:
    from pymerge.recipe_values import Reference


def locate(
    references: Mapping[str, Reference],
    folder: Path,
    problems: list[str],
    notes: list[str],
    adapted: dict[Path, Adapted],
    named: Mapping[str, Path],
) -> dict[str, Path]:
    """The path of each reference; keys are the places in the recipe.

    `named`: where the merges that other documents name lie, or will lie. Else the path must exist: a relative
    one starts at `folder`, then at the working directory. What cannot be found is a problem. The
    hub is asked last, and only if there is no other problem: a download may take hours. A model with a LoRA
    gets a path that stands for both, which `adapted` then explains.
    """
    parts: dict[str, Path] = {}
    remote: list[tuple[str, str, str | None, str]] = []
    halves = {where: _halves(reference, folder) for where, reference in references.items()}
    for where, (model, lora) in halves.items():
        if references[where].overrides:
            notes.append(f"{where}: override_architecture has no effect: tensors go by their names")
        for place, part in ((where, model), (_lora(where), lora)):
            if part is None:
                continue
            name, revision = _split(part, folder)
            path = named.get(name) or _local(name, folder)
            if path is not None:
                parts[place] = path
                if revision is not None:
                    notes.append(f"{where}: the revision {revision} has no effect: {path} is a local path")
            elif is_hub_name(name):
                remote.append((place, name, revision, _looked(name, folder)))
            else:
                problems.append(f"{place}: no such file or folder: {_looked(name, folder)}")
    for place, name, revision, looked in remote if not problems else ():
        try:
            parts[place] = fetch(name, revision)
        except RecipeError as error:
            problems.append(f"{place}: no such file or folder: {looked}; {error}")
    found: dict[str, Path] = {}
    for where, (_, lora) in halves.items():
        if lora is None and where in parts:
            found[where] = parts[where]
        elif where in parts and _lora(where) in parts:
            both = Adapted(parts[where], parts[_lora(where)])
            found[where] = both.path
            adapted[both.path] = both
    return found


def _lora(where: str) -> str:
    return f"{where} (its LoRA)"


def _halves(reference: Reference, folder: Path) -> tuple[Reference, Reference | None]:
    """The model and its LoRA; an existing path wins, so that a folder name may hold the sign."""
    text = reference.text
    if not reference.splits or "+" not in text or _local(text, folder) is not None:
        return reference, reference.lora
    model, _, lora = text.partition("+")
    return reference._replace(text=model), type(reference)(lora)


def _split(reference: Reference, folder: Path) -> tuple[str, str | None]:
    """Name and revision; an existing path wins, so that a folder name may hold the sign."""
    text = reference.text
    if not reference.splits or "@" not in text or _local(text, folder) is not None:
        return text, reference.revision
    name, _, revision = text.rpartition("@")
    return name, revision or reference.revision


def _candidates(name: str, folder: Path) -> list[Path]:
    given = Path(os.path.expanduser(name))  # not Path.expanduser, which raises where nobody has that name
    return [given] if given.is_absolute() else [folder / given, Path.cwd() / given]


def _local(name: str, folder: Path) -> Path | None:
    return next((path for path in _candidates(name, folder) if os.path.exists(path)), None)


def _looked(name: str, folder: Path) -> str:
    return " or ".join(dict.fromkeys(os.path.abspath(path) for path in _candidates(name, folder)))
