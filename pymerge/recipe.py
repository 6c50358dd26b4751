"""Recipes: mergekit's YAML, read strictly, into plain frozen data.

Unknown keys are errors (mergekit ignores them), and forms that are not covered yet are refused by name.
All problems of one recipe are reported together, one sentence each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.dtypes import DType
from pymerge.errors import ProblemList, RecipeError
from pymerge.parameters import Parameter, Preset

if TYPE_CHECKING:
    from pymerge.recipe_schema import MergeSchema

MAX_RECIPE_BYTES = 1_000_000
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One input of `models`: an existing folder or file, and the parameters given with it."""

    path: Path
    parameters: dict[str, Parameter]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge. `dtype`: inputs are rounded to it first; `out_dtype`: the output's; `text`: verbatim."""

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


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; relative model paths start at its folder, then at the working directory.

    Raises RecipeError (unreadable, not YAML) or ProblemList (everything else, all at once).
    """
    if path.exists() and not path.is_file():
        raise RecipeError(f"recipe {path} is not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}") from error
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"recipe {path} is larger than {MAX_RECIPE_BYTES:,} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start})") from error
    return parse_recipe(text, path.parent)


def parse_recipe(text: str, folder: Path) -> Recipe:
    """Parse recipe YAML; relative model paths start at `folder`, then at the working directory.

    Raises RecipeError (not YAML) or ProblemList (everything else, all at once).
    """
    from pymerge.recipe_schema import read_yaml, validate

    schema, problems = validate(read_yaml(text))
    if schema is None:
        raise ProblemList(problems)
    recipe = _resolve(schema, text, folder, problems)
    if problems:
        raise ProblemList(problems)
    return recipe


def _resolve(schema: MergeSchema, text: str, folder: Path, problems: list[str]) -> Recipe:
    models = []
    for number, model in enumerate(schema.models):
        path = _find(model.model, f"models[{number}].model", folder, problems)
        models.append(ModelEntry(path, model.parameters.given()))
    seen: dict[Path, int] = {}
    for number, entry in enumerate(models):
        first = seen.setdefault(entry.path.resolve(), number)
        if first != number:
            problems.append(f"models[{number}].model: {entry.path} is already listed as models[{first}]")
    base = None if schema.base_model is None else _find(schema.base_model, "base_model", folder, problems)
    return Recipe(
        method=schema.merge_method,
        models=tuple(models),
        base=base,
        dtype=schema.dtype,
        out_dtype=schema.out_dtype,
        parameters=schema.parameters.given(),
        seed=schema.seed,
        preset=schema.preset,
        text=text,
    )


def _find(name: str, where: str, folder: Path, problems: list[str]) -> Path:
    """The existing local path that `name` means; else a problem, with what the name seems to be."""
    given = Path(name).expanduser()
    candidates = [given] if given.is_absolute() else [folder / given, Path.cwd() / given]
    for path in candidates:
        if path.exists():
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
    return given
