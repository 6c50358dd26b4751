"""Recipes: mergekit's YAML, read strictly, into plain frozen data.

Unknown keys are errors (mergekit ignores them), and forms that are not covered yet are refused by name.
All problems of one recipe are reported together, one sentence each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pymerge.adapted import Adapted, TokenizerRule
from pymerge.dtypes import DType
from pymerge.errors import ProblemList, RecipeError
from pymerge.files import read_file
from pymerge.parameters import Parameter, Preset
from pymerge.references import locate
from pymerge.text import printable, shown

if TYPE_CHECKING:
    from pymerge.recipe_schema import ModelData, ModuleData, RecipeData
    from pymerge.recipe_values import Reference

MAX_RECIPE_BYTES = 1_000_000


class ModelEntry(NamedTuple):
    """One model of `models` or of a slice's `sources`: a folder or file, and the parameters given with it.

    `layers`: those that a slice takes of it; None: the whole model.
    """

    path: Path
    parameters: dict[str, Parameter]
    layers: range | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of layers of the output, merged from as many layers of each source; without slices, all of it."""

    sources: tuple[ModelEntry, ...]
    base: Path | None
    parameters: dict[str, Parameter]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge. `dtype`: inputs are rounded to it first; `out_dtype`: the output's; `text`: verbatim.

    Of `models`, `slices` and `modules` one is given; modules are recipes of their own, by the names of
    the parts of the model that they merge. `module`: the parameters of a module, if it is one.
    `notes`: what has no effect, one sentence each. `adapted`: what those paths stand for that are a model
    with a LoRA. `tokenizer`: None: the base's, and vocabularies must be equal. `chat_template`: as given.
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
    slices: tuple[Slice, ...] = ()
    module: dict[str, Parameter] = field(default_factory=dict)
    modules: Mapping[str, Recipe] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapted: Mapping[Path, Adapted] = field(default_factory=dict)
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None

    @property
    def split(self) -> tuple[tuple[str, Recipe], ...]:
        """The modules and their names, or the recipe itself, without a name."""
        return tuple(self.modules.items()) or (("", self),)

    @property
    def stack(self) -> tuple[Slice, ...]:
        """The output from its first layer to its last: the slices, or the models as a single one."""
        if self.modules:
            return tuple(part for module in self.modules.values() for part in module.stack)
        return self.slices or (Slice(self.models, self.base, {}),)

    @property
    def merged(self) -> list[Path]:
        """Every model that takes part, bases first."""
        bases = [self.base, *(part.base for part in self.stack)]
        entries = [entry for part in self.stack for entry in part.sources]
        return list(dict.fromkeys([*filter(None, bases), *(entry.path for entry in entries)]))

    @property
    def paths(self) -> list[Path]:
        """Every folder or file that the recipe names."""
        named = [*self.merged]
        if self.tokenizer is not None and self.tokenizer.source is not None:
            named.append(self.tokenizer.source)
        return list(dict.fromkeys(path for name in named for path in self.adapted.get(name, (name,))))

    def home(self, path: Path) -> Path:
        """The model that `path` stands for, without the LoRA that it may have: where its side files lie."""
        return self.adapted[path].model if path in self.adapted else path

    def scopes(self, part: Slice, entry: ModelEntry | None = None) -> tuple[Mapping[str, Parameter], ...]:
        """Where parameters are looked up, the nearest first: those of one model, or of all models."""
        shared = (part.parameters, self.module, self.parameters)
        return (entry.parameters, *shared) if entry else shared


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

    Raises RecipeError (unreadable, not one YAML document) or ProblemList (everything else, all at once).
    """
    return single(load_documents(Path(path))).draft().checked()


def parse_recipe(text: str, folder: Path | str) -> Recipe:
    """Parse recipe YAML; relative model paths start at `folder`, then at the working directory.

    Raises RecipeError (not one YAML document) or ProblemList (everything else, all at once).
    """
    return single(parse_documents(text, Path(folder))).draft().checked()


class Document(NamedTuple):
    """One YAML document of a recipe: the `number`-th, read from `folder`; `value`: what its text says.

    `name`: what later documents call its merge; None: its merge is the output.
    """

    number: int
    name: str | None
    text: str
    value: object
    folder: Path

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"document {self.number}" + (f" ({printable(self.name)})" if self.name else "")

    def draft(self, named: Mapping[str, Path] = MappingProxyType({})) -> Draft:
        """The recipe that it is; `named`: where merges lie that have names. Raises RecipeError."""
        return _draft(self, named)


def load_documents(path: Path) -> tuple[Document, ...]:
    """The documents of a recipe file. Raises RecipeError: unreadable, or not YAML."""
    data = read_file(path, MAX_RECIPE_BYTES, RecipeError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start})") from error
    return parse_documents(text, path.parent)


def parse_documents(text: str, folder: Path) -> tuple[Document, ...]:
    """The documents of recipe YAML; where all have names, the last one is the output all the same.

    Raises RecipeError: not YAML.
    """
    from pymerge.recipe_yaml import read_yaml

    found = [
        Document(number, name_of(value), part, value, folder)
        for number, (part, value) in enumerate(read_yaml(text), 1)
    ]
    if all(document.name for document in found):
        found[-1] = found[-1]._replace(name=None)
    return tuple(found)


def name_of(value: object) -> str | None:
    """The name that a document gives itself, right or wrong."""
    name = value.get("name") if isinstance(value, dict) else None
    return None if name is None else str(name)


def single(documents: Sequence[Document]) -> Document:
    """The only document; RecipeError where there are several."""
    if len(documents) > 1:
        raise RecipeError(
            f"the recipe has {len(documents)} YAML documents, expected one; pymerge.merge and"
            " pymerge.plan_documents take several"
        )
    return documents[0]


def _draft(document: Document, named: Mapping[str, Path]) -> Draft:
    from pymerge.recipe_schema import validate
    from pymerge.recipe_tokenizer import references_of, rule_of, tokenizer_data

    text, folder = document.text, document.folder
    try:
        data, problems, unusable = validate(document.value)
    except (RecursionError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise RecipeError(f"the recipe cannot be read: {type(error).__name__}") from error
    if data is None:
        return Draft(None, tuple(problems))
    modules = _modules(data)
    notes: list[str] = []
    if data["name"] is not None and document.name is None:
        notes.append(f"name {shown(data['name'])} has no effect: this merge is the output")
    tokenizer = tokenizer_data(data["tokenizer"], data["tokenizer_source"])
    places = (*_references(data, modules), *references_of(tokenizer))
    references = {place: reference for place, reference in places if place not in unusable}
    adapted: dict[Path, Adapted] = {}
    found = locate(references, folder, problems, notes, adapted, named)
    # A slice that is wrong says nothing of the others' layers either.
    if any(place.startswith(("slices", "modules")) for place in unusable):
        return Draft(None, tuple(problems))
    missing: set[Path] = set()

    def path_of(reference: Reference, place: str) -> Path:
        if place not in found:
            missing.add(Path(place if place in unusable else reference.text))
        return found.get(place) or Path(place if place in unusable else reference.text)

    def entries(models: Sequence[ModelData], place: str) -> tuple[ModelEntry, ...]:
        made = tuple(
            ModelEntry(
                path_of(model["model"], f"{place}[{number}].model"),
                model["parameters"],
                model.get("layer_range"),
            )
            for number, model in enumerate(models)
        )
        _refuse_twins(made, place, problems)
        return made

    base = None if data["base_model"] is None else path_of(data["base_model"], "base_model")

    def slices(module: ModuleData, where: str) -> Iterator[Slice]:
        for number, part in enumerate(module["slices"] or ()):
            place = f"{where}slices[{number}]"
            own = part["base_model"]
            if part["residual_weight"] is not None:
                notes.append(f"{place}: residual_weight has no effect")
            yield Slice(
                entries(part["sources"], f"{place}.sources"),
                base if own is None else path_of(own, f"{place}.base_model"),
                part["parameters"],
            )

    stacks = {
        name: (entries(module["models"] or (), f"{where}models"), tuple(slices(module, where)))
        for name, (where, module) in modules.items()
    }
    first = next(iter(modules))
    recipe = Recipe(
        method="" if "merge_method" in unusable else data["merge_method"],
        models=stacks[first][0],
        base=base,
        dtype=data["dtype"],
        out_dtype=data["out_dtype"],
        parameters=data["parameters"],
        seed=data["seed"],
        preset=data["preset"],
        text=text,
        slices=stacks[first][1],
        module={} if data["modules"] is None else modules[first][1]["parameters"],
        notes=tuple(notes),
        adapted=adapted,
        tokenizer=rule_of(tokenizer, path_of),
        chat_template=data["chat_template"],
    )
    if len(modules) > 1:
        parts = {
            name: replace(recipe, models=stack[0], slices=stack[1], module=modules[name][1]["parameters"])
            for name, stack in stacks.items()
        }
        recipe = replace(recipe, models=(), slices=(), module={}, modules=parts)
    return Draft(recipe, tuple(problems), frozenset(missing))


def _modules(data: RecipeData) -> dict[str, tuple[str, ModuleData]]:
    """What is merged, and where in the recipe it stands."""
    if data["modules"] is None:
        return {"": ("", data)}
    return {name: (f"modules.{name}.", module) for name, module in data["modules"].items()}


def _references(
    data: RecipeData, modules: Mapping[str, tuple[str, ModuleData]]
) -> Iterator[tuple[str, Reference]]:
    """Every model that is named, and its place."""
    for where, module in modules.values():
        for number, model in enumerate(module["models"] or ()):
            yield f"{where}models[{number}].model", model["model"]
        for number, part in enumerate(module["slices"] or ()):
            place = f"{where}slices[{number}]"
            for source, model in enumerate(part["sources"]):
                yield f"{place}.sources[{source}].model", model["model"]
            if part["base_model"] is not None:
                yield f"{place}.base_model", part["base_model"]
    if data["base_model"] is not None:
        yield "base_model", data["base_model"]


def _refuse_twins(entries: Sequence[ModelEntry], place: str, problems: list[str]) -> None:
    seen: dict[str, int] = {}
    real = {path: os.path.realpath(path) for path in {entry.path for entry in entries}}
    for number, entry in enumerate(entries):
        first = seen.setdefault(real[entry.path], number)
        if first != number:
            problems.append(f"{place}[{number}].model: {entry.path} is already listed as {place}[{first}]")
