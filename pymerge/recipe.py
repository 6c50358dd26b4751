"""Recipes: mergekit's YAML, read strictly, into plain frozen data.

Unknown keys are errors (mergekit ignores them), and forms that are not covered yet are refused by name.
All problems of one recipe are reported together, one sentence each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pymerge.dtypes import DType
from pymerge.errors import ProblemList, RecipeError
from pymerge.files import read_file
from pymerge.parameters import Parameter, Preset

MAX_RECIPE_BYTES = 1_000_000
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class ModelEntry(NamedTuple):
    """One input of `models`: an existing folder or file, and the parameters given with it."""

    path: Path
    parameters: dict[str, Parameter]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge. `dtype`: inputs are rounded to it first; `out_dtype`: the output's; `text`: verbatim.

    Made by `load_recipe` or `parse_recipe`.
    """

    method: str
    models: tuple[ModelEntry, ...]
    base: Path | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: dict[str, Parameter]
    seed: int
    preset: Preset
    text: str

    def parameter(self, entry: ModelEntry, name: str) -> Parameter | None:
        """The value of `name` for one model: its own, else the top level's, else None."""
        return entry.parameters.get(name, self.parameters.get(name))


class Draft(NamedTuple):
    """A recipe as far as it can be read: harmless values stand where it is wrong, and `problems` say where.

    `recipe`: None when not even the models are known. `missing`: models that do not exist, which are among
    the problems already.
    """

    recipe: Recipe | None
    problems: tuple[str, ...] = ()
    missing: frozenset[Path] = frozenset()

    def checked(self) -> Recipe:
        """The recipe; ProblemList when there is any problem."""
        if self.recipe is None or self.problems:
            raise ProblemList(self.problems)
        return self.recipe


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file; relative model paths start at its folder, then at the working directory.

    Raises RecipeError (unreadable, not YAML) or ProblemList (everything else, all at once).
    """
    return load_draft(Path(path)).checked()


def parse_recipe(text: str, folder: Path | str) -> Recipe:
    """Parse recipe YAML; relative model paths start at `folder`, then at the working directory.

    Raises RecipeError (not YAML) or ProblemList (everything else, all at once).
    """
    return parse_draft(text, Path(folder)).checked()


def load_draft(path: Path) -> Draft:
    """`load_recipe`, but what is wrong inside the recipe is left to the caller. Raises RecipeError."""
    data = read_file(path, MAX_RECIPE_BYTES, RecipeError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start})") from error
    return parse_draft(text, path.parent)


def parse_draft(text: str, folder: Path) -> Draft:
    """`parse_recipe`, but what is wrong inside the recipe is left to the caller. Raises RecipeError."""
    from pymerge.recipe_schema import validate
    from pymerge.recipe_yaml import read_yaml

    data, problems, unusable = validate(read_yaml(text))
    if data is None:
        return Draft(None, tuple(problems))
    missing: set[Path] = set()

    def found(name: str, where: str) -> Path:
        path = None if where in unusable else _find(name, where, folder, problems)
        if path is None:
            path = Path(where if where in unusable else name)
            missing.add(path)
        return path

    models = []
    for number, model in enumerate(data["models"]):
        models.append(ModelEntry(found(model["model"], f"models[{number}].model"), model["parameters"]))
    _refuse_twins(models, problems)
    recipe = Recipe(
        method="" if "merge_method" in unusable else data["merge_method"],
        models=tuple(models),
        base=None if data["base_model"] is None else found(data["base_model"], "base_model"),
        dtype=data["dtype"],
        out_dtype=data["out_dtype"],
        parameters=data["parameters"],
        seed=data["seed"],
        preset=data["preset"],
        text=text,
    )
    return Draft(recipe, tuple(problems), frozenset(missing))


def _refuse_twins(models: Sequence[ModelEntry], problems: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, entry in enumerate(models):
        first = seen.setdefault(os.path.realpath(entry.path), number)
        if first != number:
            problems.append(f"models[{number}].model: {entry.path} is already listed as models[{first}]")


def _find(name: str, where: str, folder: Path, problems: list[str]) -> Path | None:
    """The existing local path that `name` means; else a problem, with what the name seems to be."""
    given = Path(os.path.expanduser(name))  # not Path.expanduser, which raises where nobody has that name
    candidates = [given] if given.is_absolute() else [folder / given, Path.cwd() / given]
    for path in candidates:
        if os.path.exists(path):
            return path
    # An existing path wins, so that a folder name may hold the two signs.
    if "+" in name:
        problems.append(f"{where}: {name}: a LoRA after '+' is not supported yet")
    elif "@" in name:
        problems.append(f"{where}: {name}: a revision after '@' is not supported yet")
    else:
        looked = " or ".join(dict.fromkeys(str(path) for path in candidates))
        hub = "; names on the Hugging Face hub are not supported yet" if _HUB_NAME.fullmatch(name) else ""
        problems.append(f"{where}: no such file or folder: {looked}{hub}")
    return None
