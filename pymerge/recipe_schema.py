"""The recipe's grammar, as tables that pydantic_core checks; imported only when a recipe is parsed.

pydantic itself would take 0.1 s to import and to build its classes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, TypedDict

from pydantic_core import ErrorDetails, SchemaValidator, ValidationError, core_schema

from pymerge.dtypes import DType
from pymerge.parameters import Parameter, Preset
from pymerge.recipe_tokenizer import TOKENIZER, TOKENIZER_TAGS, TokenizerData, known_keys
from pymerge.recipe_values import (
    CASE_KEYS,
    FLAG,
    LAYERS,
    NUMBER,
    PATH_KEYS,
    REFERENCE,
    REFERENCE_KEYS,
    SEED,
    TAGS,
    TEXT,
    TYPE,
    Key,
    Reference,
    listing,
    mapping,
    member,
    optional,
    otherwise,
    required,
)
from pymerge.rule import Scope, ThresholdTies

# What pydantic_core ends the location of a key with.
_KEY = "[key]"
# What numbers that have a range may be.
_RANGES = {
    "seed": "from 0 to 2**64 - 1",
    "token_id": "from 0 to 2**31 - 1",
    "pad_to_multiple_of": "from 1 to 2**31 - 1",
}
# Keys of mergekit-moe's recipes, which look like those of a merge.
_OF_MIXTURES = ("gate_mode", "experts", "experts_per_token", "shared_experts")
# Exactly one of them says what is merged.
STACKS = ("models", "slices", "modules")


class ModelData(TypedDict):
    """One checked entry of `models`, or of a slice's `sources` (then with `layer_range`)."""

    model: Reference
    layer_range: range | None
    parameters: dict[str, Parameter]


class SliceData(TypedDict):
    """One checked entry of `slices`."""

    sources: list[ModelData]
    base_model: Reference | None
    residual_weight: object
    parameters: dict[str, Parameter]


class ModuleData(TypedDict):
    """What is merged: exactly one of `models` and `slices`."""

    models: list[ModelData] | None
    slices: list[SliceData] | None
    parameters: dict[str, Parameter]


class RecipeData(ModuleData):
    """A checked recipe, every key present; `parameters` hold what the recipe states."""

    name: str | None
    merge_method: str
    modules: dict[str, ModuleData] | None
    base_model: Reference | None
    dtype: DType | None
    out_dtype: DType | None
    preset: Preset
    seed: int
    tokenizer: TokenizerData | None
    tokenizer_source: Reference | None
    chat_template: str | None


def _given(values: dict[str, Parameter | None]) -> dict[str, Parameter]:
    """What the recipe states, without what has no effect (int8_mask)."""
    return {name: value for name, value in values.items() if value is not None and name != "int8_mask"}


def _parameters(keys: Mapping[str, Key]) -> Key:
    given = core_schema.no_info_after_validator_function(_given, mapping(dict(keys)))
    return core_schema.typed_dict_field(core_schema.with_default_schema(given, default_factory=dict))


FLAGS = ("nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "filter_wise")
NUMBERS = ("t", "eps", "max_iter", "tol", "r", "alpha", "select_topk", "claim", "votes")
MODEL_PARAMETERS = {name: optional(NUMBER) for name in ("weight", "density", "gamma", "epsilon", "scale")}
SLICE_PARAMETERS = {
    **MODEL_PARAMETERS,
    "lambda": optional(NUMBER),
    "normalize": optional(FLAG),
    "rescale": optional(FLAG),
    **{name: optional(NUMBER) for name in NUMBERS},
    **{name: optional(FLAG) for name in FLAGS},
    "int8_mask": optional(FLAG),
}
TOP_PARAMETERS = {
    **SLICE_PARAMETERS,
    "scope": optional(member(Scope)),
    "threshold_ties": optional(member(ThresholdTies)),
}
MODEL = {"model": required(REFERENCE), "parameters": _parameters(MODEL_PARAMETERS)}
SOURCE = {**MODEL, "layer_range": required(LAYERS)}
SLICE = {
    "sources": required(listing(mapping(SOURCE))),
    "base_model": optional(REFERENCE),
    "residual_weight": otherwise(None, core_schema.any_schema()),
    "parameters": _parameters(SLICE_PARAMETERS),
}
MODULE = {
    "models": optional(listing(mapping(MODEL))),
    "slices": optional(listing(mapping(SLICE))),
    "parameters": _parameters(SLICE_PARAMETERS),
}
RECIPE = {
    "merge_method": required(TEXT),
    **MODULE,
    "modules": optional(core_schema.dict_schema(TEXT, mapping(MODULE), strict=True, min_length=1)),
    "base_model": optional(REFERENCE),
    "dtype": optional(TYPE),
    "out_dtype": optional(TYPE),
    "parameters": _parameters(TOP_PARAMETERS),
    "preset": otherwise(Preset.MERGEKIT, member(Preset)),
    "seed": otherwise(0, SEED),
    "tokenizer": optional(TOKENIZER),
    "tokenizer_source": optional(REFERENCE),
    "chat_template": optional(TEXT),
    "name": optional(TEXT),
}


@cache
def _grammar() -> SchemaValidator:
    return SchemaValidator(mapping(RECIPE))


def validate(data: object) -> tuple[RecipeData | None, list[str], set[str]]:
    """The recipe, every problem as a sentence, and the places whose value is not the recipe's own.

    Where the recipe is wrong a neutral value stands; None when too little is left.
    """
    if not isinstance(data, dict):
        return None, [f"a recipe is a mapping with merge_method and models, not {_kind(data)}"], set()
    problems: list[str] = []
    unusable: set[str] = set()
    kept = _without_null_parameters(data)
    try:
        return _whole(_grammar().validate_python(kept), problems), problems, unusable
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems += [_sentence(detail) for detail in details]
    for detail in details:
        _mend(kept, detail, unusable)
    if any(place.endswith(STACKS) for place in unusable):
        return None, problems, unusable
    try:
        return _whole(_grammar().validate_python(kept), problems), problems, unusable
    except ValidationError:
        return None, problems, unusable


def _whole(data: RecipeData, problems: list[str]) -> RecipeData | None:
    """The recipe if it says in exactly one way what is merged; else the problem is added."""
    if data["tokenizer"] is not None and data["tokenizer_source"] is not None:
        problems.append("tokenizer and tokenizer_source exclude each other; give one")
    before = len(problems)
    _check_stack(data, "", STACKS, problems)
    modules = data["modules"] or {}
    for name, module in modules.items():
        _check_stack(module, f"modules.{name}.", STACKS[:2], problems)
    return data if len(problems) == before else None


def _check_stack(data: Mapping[str, Any], where: str, keys: tuple[str, ...], problems: list[str]) -> None:
    given = [key for key in keys if data[key] is not None]
    if not given:
        others = " or ".join(keys[1:])
        problems.append(f"{where}models: this key is required, or else {others}")
    elif len(given) > 1:
        problems.append(f"{where}{given[0]} and {' and '.join(given[1:])} exclude each other; give one")


def _neutral(key: int | str, of: int | str) -> Any:
    """What causes no further problem in place of a wrong value under `key`, or in the list under `of`."""
    source = {"model": ".", "parameters": {"weight": 1.0}}
    sliced = {**source, "layer_range": [0, 1]}
    if isinstance(key, int):
        return {"models": source, "sources": sliced, "slices": {"sources": [sliced]}}.get(str(of))
    texts = {"merge_method": "-", "model": ".", "base_model": ".", "layer_range": [0, 1]}
    return {**texts, "parameters": {"weight": 1.0}, "sources": [sliced]}.get(key)


def _mend(data: Any, detail: ErrorDetails, unusable: set[str]) -> None:
    """Take the value that `detail` complains of out of `data`."""
    path = list(_location(detail))
    if _is_of_a_key(detail):  # the location has its text only
        path = [*path[: -2 if path[-1] == _KEY else -1], detail["input"]]
    for wide in ("parameters", "model", "base_model"):  # what is wrong inside spoils all of the value
        if wide in path:
            del path[path.index(wide) + (2 if wide == "parameters" else 1) :]
    *above, key = path
    try:
        for step in above:
            data = data[step]
    except LookupError:  # it stood under a key that is gone already
        return
    of = above[-1] if above else ""
    known = detail["type"] != "extra_forbidden" or len(path) < len(_location(detail))
    if of == "parameters" and known and key in ("weight", "density", "lambda", "t"):
        data[key] = 1.0
    elif of == "parameters":
        data.pop(key, None)
        data.setdefault("weight", 1.0)  # which may be what the unknown key was meant to be
    elif known and (neutral := _neutral(key, of)) is not None:
        data[key] = neutral
    elif isinstance(data, dict):
        data.pop(key, None)
    unusable.add(_place((*path, "model") if isinstance(key, int) else tuple(path)))


def _without_null_parameters(data: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """`parameters:` with nothing after it means none, as in mergekit."""
    cleaned: dict[Hashable, Any] = {}
    for key, value in data.items():
        if key == "parameters" and value is None:
            continue
        if key in ("models", "slices", "sources") and isinstance(value, list):
            value = [_without_null_parameters(item) if isinstance(item, dict) else item for item in value]
        elif key == "modules" and isinstance(value, dict):
            value = {
                name: _without_null_parameters(item) if isinstance(item, dict) else item
                for name, item in value.items()
            }
        elif key == "parameters" and isinstance(value, dict):
            value = dict(value)
        cleaned[key] = value
    return cleaned


def _location(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Where it is, without the tags of pydantic_core."""
    return tuple(part for part in detail["loc"] if part not in (*TAGS, *TOKENIZER_TAGS))


def _kind(value: object) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _sentence(detail: ErrorDetails) -> str:
    loc = _location(detail)
    where = _place(loc)
    value = detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(loc, where)
    if kind == "missing":
        return f"{where}: this key is required"
    if kind in ("form", "choice"):  # our own words
        return f"{where}: {detail['msg']}"
    if kind == "finite_number":
        return f"{where}: {value} is not finite"
    if kind == "literal_error":
        return f"{where}: {reprlib.repr(value)} is not known; known are {detail['ctx']['expected']}"
    if _is_of_a_key(detail):
        place = _place(loc[:-2] if loc[-1] == _KEY else loc[:-1])
        return (
            f"{place + ': ' if place else ''}the key {reprlib.repr(value)} is {_kind(value)}, expected text"
        )
    wanted = {
        "float_type": "a number",
        "bool_type": "true or false",
        "int_type": "a whole number",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a mapping",
        "too_short": "a list with at least one entry",
        "string_too_short": "text that is not empty",
        "string_unicode": "text in valid Unicode",
    }.get(kind, "something else")
    if kind in ("greater_than_equal", "less_than"):
        wanted = f"a whole number {_RANGES[str(loc[-1])]}"
    if kind == "too_short" and isinstance(value, dict):
        wanted = "a mapping with at least one entry"
    return f"{where}: expected {wanted}, found {_kind(value)} ({reprlib.repr(value)})"


def _is_of_a_key(detail: ErrorDetails) -> bool:
    """Whether a key itself is wrong, and not what stands under it."""
    return detail["type"] == "invalid_key" or detail["loc"][-1:] == (_KEY,)


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _known_keys(parents: tuple[int | str, ...]) -> Mapping[str, Key] | tuple[str, ...]:
    """The keys of the mapping that lies under `parents`."""
    names = [part for part in parents if isinstance(part, str)]
    if names[:1] == ["tokenizer"]:
        return known_keys(names)
    if "parameters" in names:
        if names[-1] != "parameters":
            return CASE_KEYS
        inner = "models" in names or "sources" in names
        return MODEL_PARAMETERS if inner else SLICE_PARAMETERS if len(names) > 1 else TOP_PARAMETERS
    if depth := names.count("model") + names.count("base_model"):
        return REFERENCE_KEYS if depth == 1 else PATH_KEYS
    if not names:
        return RECIPE
    lists: dict[str, Mapping[str, Key]] = {"models": MODEL, "sources": SOURCE, "slices": SLICE}
    known: Mapping[str, Key] = lists.get(names[-1], MODULE)
    return known


def _unknown_key(loc: tuple[int | str, ...], where: str) -> str:
    key, parents = str(loc[-1]), loc[:-1]
    known = _known_keys(parents)
    if parents and parents[-1] == "parameters":
        if key in TOP_PARAMETERS:
            level = "of a slice or of the recipe" if key in SLICE_PARAMETERS else "of the recipe"
            return f"{where}: {key} holds for all models; give it under the parameters {level}"
        if key in RECIPE:
            return f"{where}: {key} is no parameter; give it at the top of the recipe"
    elif not parents and key in TOP_PARAMETERS:
        return f"{where}: {key} is a parameter; give it under parameters"
    elif not parents and key in _OF_MIXTURES:
        return f"{where}: {key} is a key of mergekit-moe, which builds mixtures of experts; pymerge does not"
    from difflib import get_close_matches  # late: only for what is wrong

    near = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{where}: unknown key {reprlib.repr(key)}; {hint}"
