"""From the names that a recipe gives its models to files and folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.errors import RecipeError
from pymerge.hub import fetch, is_hub_name

if TYPE_CHECKING:
    from pymerge.recipe_values import Reference


def locate(
    references: Mapping[str, Reference], folder: Path, problems: list[str], notes: list[str]
) -> dict[str, Path]:
    """The existing path of each reference; keys are the places in the recipe.

    A relative path starts at `folder`, then at the working directory. What cannot be found is a problem. The
    hub is asked last, and only if there is no other problem: a download may take hours.
    """
    found: dict[str, Path] = {}
    remote: dict[str, tuple[str, str | None, str]] = {}
    for where, reference in references.items():
        name, revision = _split(reference, folder)
        path = _local(name, folder)
        if reference.overrides:
            notes.append(f"{where}: override_architecture has no effect: tensors go by their names")
        if "+" in name and reference.splits and path is None:
            problems.append(f"{where}: {name}: a LoRA after '+' is not supported yet")
        elif path is not None:
            found[where] = path
            if revision is not None:
                notes.append(f"{where}: the revision {revision} has no effect: {path} is a local path")
        elif is_hub_name(name):
            remote[where] = (name, revision, _looked(name, folder))
        else:
            problems.append(f"{where}: no such file or folder: {_looked(name, folder)}")
    for where, (name, revision, looked) in remote.items() if not problems else ():
        try:
            found[where] = fetch(name, revision)
        except RecipeError as error:
            problems.append(f"{where}: no such file or folder: {looked}; {error}")
    return found


def _split(reference: Reference, folder: Path) -> tuple[str, str | None]:
    """Name and revision; an existing path wins, so that a folder name may hold the signs."""
    text = reference.text
    if not reference.splits or "+" in text or "@" not in text or _local(text, folder) is not None:
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
