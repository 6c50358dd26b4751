"""The settings of a sweep: what they may be, what their folders are called, and what documents they make."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pymerge.errors import RecipeError
from pymerge.text import shown

if TYPE_CHECKING:
    from pymerge.recipe import Document

Value: TypeAlias = "float | bool | str"
# The parameters that one output is merged with, instead of the recipe's: NAME, or NAME@MODEL for one model.
Setting: TypeAlias = Mapping[str, Value]

SEED = "seed"  # stands beside the parameters, not among them
AT = "@"
# Of the in-memory API, where lambda is a word of the language.
SPELLINGS = MappingProxyType({"lambda_": "lambda"})
# What a value in words may consist of, as it becomes part of a folder's name; and what a model's name there.
WORD, IN_FOLDER = re.compile(r"[a-z_]+", re.ASCII), re.compile(r"[^\w.+@ -]")
# Each has a plan, a folder and open files of its own.
MOST_SETTINGS = 10_000


class Key(NamedTuple):
    """A parameter of all models, or of the one whose path ends in `model`."""

    name: str
    model: str | None

    @classmethod
    def of(cls, text: str) -> Key:
        """As it stands in a setting."""
        name, at, model = text.partition(AT)
        return cls(SPELLINGS.get(name, name), model if at else None)

    def __str__(self) -> str:
        return self.name if self.model is None else f"{self.name}{AT}{self.model}"


def grid(values: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values, the last parameter's changing fastest. Raises RecipeError."""
    lists = {}
    for name, some in values.items():
        if isinstance(some, (str, bytes)) or not isinstance(some, Iterable):
            raise RecipeError(f"{name} of the sweep is {shown(some)}, expected a list of values")
        lists[name] = list(some)
    _check_number(math.prod(map(len, lists.values())))
    return [dict(zip(lists, row, strict=True)) for row in itertools.product(*lists.values())]


def settings_of(given: object) -> list[dict[str, Any]]:
    """The settings of a sweep: those given, or every combination of the values given. Raises RecipeError."""
    if isinstance(given, Mapping):
        return grid(given)
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RecipeError(f"the settings of the sweep are {shown(given)}, expected values for each parameter")
    settings = list(given)
    for setting in settings:
        if not isinstance(setting, Mapping):
            raise RecipeError(
                f"a setting of the sweep is {shown(setting)}, expected a value for each parameter"
            )
    _check_number(len(settings))
    return [dict(setting) for setting in settings]


def _check_number(count: int) -> None:
    if count > MOST_SETTINGS:
        raise RecipeError(f"the sweep has {count:,} settings, at most {MOST_SETTINGS:,} are merged together")


def wrong_settings(settings: Sequence[Setting]) -> Iterator[str]:
    """What keeps settings from being merged, whatever the recipe."""
    if not settings:
        yield "a sweep needs at least one setting"
    for setting in settings:
        if not setting:
            yield "a setting of the sweep changes no parameter"
        seen: set[Key] = set()
        for key, value in setting.items():
            if not _is_key(key):
                yield f"{shown(str(key))} cannot be the name of a parameter, nor NAME@MODEL"
                continue
            if Key.of(key) in seen:
                yield f"{Key.of(key)} is given twice in a setting"
            seen.add(Key.of(key))
            if not _is_value(value):
                yield f"{key} of a setting is {shown(value)}, expected a finite number, true, false or a word"


def _is_key(text: object) -> bool:
    if not isinstance(text, str):
        return False
    key = Key.of(text)
    one_model = key.model is not None
    return key.name.isidentifier() and (
        not one_model or (key.name != SEED and bool(_parts(key.model)) and str(key.model).isprintable())
    )


def _is_value(value: object) -> bool:
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    try:
        return isinstance(value, bool) or (isinstance(value, Real) and math.isfinite(value))
    except OverflowError:  # a whole number that is no float
        return False


def plain(setting: Setting) -> dict[str, Value]:
    """The setting with Python's own numbers (numpy's are none that YAML knows) and the recipe's names."""
    return {
        str(Key.of(key)): value if isinstance(value, (bool, str)) else _number(value)
        for key, value in setting.items()
    }


def _number(value: float) -> float:
    """Whole ones stay whole: a seed may have more digits than a float."""
    return int(value) if isinstance(value, Integral) else float(value)


def folder_name(setting: Setting) -> str:
    """What the setting's folder is called: density0.2-normalize-true-weight@expert=0.5."""
    return "-".join(_in_folder_name(key, value) for key, value in setting.items())


def _in_folder_name(key: str, value: Value) -> str:
    is_word = isinstance(value, (bool, str))
    text = str(value).lower() if is_word else repr(value).removesuffix(".0")
    if AT in key:
        return f"{IN_FOLDER.sub('_', key)}={text}"
    return f"{key}-{text}" if is_word else f"{key}{text}"


def with_setting(document: Document, setting: Setting) -> Document:
    """The document as if it had been written with the setting's parameters. Raises RecipeError."""
    from pymerge.recipe_yaml import write_yaml

    value = document.value
    if not isinstance(value, dict):
        return document  # which its draft will say
    keys = {Key.of(key): number for key, number in setting.items() if key != SEED}
    parameters = {key.name: number for key, number in keys.items() if key.model is None}
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
    entries = list(_model_entries(changed))
    given_to: set[tuple[str, str]] = set()
    for key, number in keys.items():
        if key.model is None:
            continue
        model = _set_for_model(entries, key, number)
        if (key.name, model) in given_to:
            raise RecipeError(f"{key.name} of {model} is given twice in a setting")
        given_to.add((key.name, model))
    return document._replace(text=write_yaml(changed), value=changed)


def _model_entries(value: Any) -> Iterator[dict[str, Any]]:
    """Every entry for a model that may have parameters of its own."""
    if isinstance(value, list):
        for entry in value:
            yield from _model_entries(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in ("models", "sources") and isinstance(entry, list):
                yield from (one for one in entry if isinstance(one, dict) and "model" in one)
            yield from _model_entries(entry)


def _set_for_model(entries: Sequence[dict[str, Any]], key: Key, number: Value) -> str:
    """Gives the model its parameter; which model it is."""
    wanted = _parts(key.model)
    texts = list(dict.fromkeys(_text_of(entry["model"]) for entry in entries))
    found = [text for text in texts if text == key.model] or [
        text for text in texts if _parts(text)[-len(wanted) :] == wanted
    ]
    if len(found) != 1:
        what = "several models whose paths end so" if found else "no model whose path ends so"
        known = ", ".join(found or texts) or "none"
        raise RecipeError(f"{key} of a setting: the recipe has {what}: {known}")
    for entry in entries:
        given = entry.get("parameters") or {}
        if _text_of(entry["model"]) == found[0] and isinstance(given, dict):
            entry["parameters"] = {**given, key.name: number}
    return found[0]


def _text_of(model: object) -> str:
    """A model as one text: path or name on the hub, @revision, +LoRA; however the recipe writes it."""
    if not isinstance(model, dict):
        return str(model)
    text = _text_of(model.get("path", model.get("model")))
    text += f"@{model['revision']}" if model.get("revision") else ""
    return text + (f"+{_text_of(model['lora'])}" if model.get("lora") else "")


def _parts(path: str | None) -> list[str]:
    return [part for part in (path or "").split("/") if part]


def _seed(value: Value) -> int:
    if isinstance(value, (bool, str)) or value != int(value):
        raise RecipeError(f"seed of a setting is {shown(value)}, expected a whole number")
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
            copy[key] = {name: _without(given, names) for name, given in entry.items() if name not in names}
        else:
            copy[key] = _without(entry, names)
    return copy
