"""The recipe's grammar, as tables that pydantic_core checks; imported only when a recipe is parsed.

pydantic itself would take 0.1 s to import and to build its classes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeAlias, TypedDict

from pydantic_core import ErrorDetails, PydanticCustomError, SchemaValidator, ValidationError, core_schema

from pymerge.dtypes import DType
from pymerge.errors import RecipeError
from pymerge.files import is_path
from pymerge.parameters import Parameter, Preset, merging_dtype
from pymerge.rule import Scope, ThresholdTies

Form: TypeAlias = core_schema.CoreSchema
Key: TypeAlias = core_schema.TypedDictField

# Keys of mergekit's grammar that this version refuses by name.
UNSUPPORTED_KEYS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "name")
UNSUPPORTED_PARAMETERS = ("epsilon", "select_topk")


class ModelData(TypedDict):
    """One checked entry of `models`."""

    model: str
    parameters: dict[str, Parameter]


class RecipeData(TypedDict):
    """A checked recipe, every key present; `parameters` hold what the recipe states."""

    merge_method: str
    models: list[ModelData]
    base_model: str | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: dict[str, Parameter]
    preset: Preset
    seed: int


def _scalar(value: object) -> object:
    """Refuse the value forms of the grammar that are not covered yet, by name."""
    if isinstance(value, list):
        conditional = any(isinstance(item, dict) for item in value)
        form = "conditional lists (filter, value)" if conditional else "gradients (lists of numbers)"
        raise PydanticCustomError("form", "{form} are not supported yet", {"form": form})
    if isinstance(value, dict):
        raise PydanticCustomError("form", "conditional values (filter, value) are not supported yet")
    return value


def _member(kind: type[Enum]) -> Form:
    """Text that is the value of one member of an enum."""

    def convert(value: object) -> Enum:
        for member in kind:
            if value == member.value or value is member:
                return member
        known = ", ".join(str(member.value) for member in kind)
        raise PydanticCustomError(
            "choice",
            "{value} is not known; known are {known}",
            {"value": reprlib.repr(value), "known": known},
        )

    return core_schema.no_info_plain_validator_function(convert)


def _dtype(value: object) -> DType:
    try:
        return merging_dtype(value if isinstance(value, str) else reprlib.repr(value))
    except RecipeError as error:
        raise PydanticCustomError("choice", "{text}", {"text": str(error)}) from error


def _reference(value: object) -> object:
    if isinstance(value, dict):
        raise PydanticCustomError("form", "model references written as mappings are not supported yet")
    if isinstance(value, str) and value and not is_path(value):
        raise PydanticCustomError(
            "form", "{name} cannot be the name of a file", {"name": reprlib.repr(value)}
        )
    return value


def _given(values: dict[str, Parameter | None]) -> dict[str, Parameter]:
    """What the recipe states, without what has no effect (int8_mask)."""
    return {name: value for name, value in values.items() if value is not None and name != "int8_mask"}


def _required(form: Form) -> Key:
    return core_schema.typed_dict_field(form, required=True)


def _optional(form: Form) -> Key:
    return _otherwise(None, core_schema.nullable_schema(form))


def _otherwise(default: object, form: Form) -> Key:
    return core_schema.typed_dict_field(core_schema.with_default_schema(form, default=default))


def _mapping(keys: Mapping[str, Key]) -> Form:
    return core_schema.typed_dict_schema(dict(keys), extra_behavior="forbid")


def _parameters(keys: Mapping[str, Key]) -> Key:
    given = core_schema.no_info_after_validator_function(_given, _mapping(keys))
    return core_schema.typed_dict_field(core_schema.with_default_schema(given, default_factory=dict))


NUMBER = core_schema.no_info_before_validator_function(
    _scalar, core_schema.float_schema(strict=True, allow_inf_nan=False)
)
FLAG = core_schema.no_info_before_validator_function(_scalar, core_schema.bool_schema(strict=True))
TEXT = core_schema.str_schema(strict=True, min_length=1)
REFERENCE = core_schema.no_info_before_validator_function(_reference, TEXT)
TYPE = core_schema.no_info_plain_validator_function(_dtype)
SEED = core_schema.int_schema(strict=True, ge=0, lt=2**64)

FLAGS = ("nuslerp_flatten", "nuslerp_row_wise", "normalize_weights", "filter_wise")
MODEL_PARAMETERS = {name: _optional(NUMBER) for name in ("weight", "density", "gamma", "scale")}
TOP_PARAMETERS = {
    **MODEL_PARAMETERS,
    "lambda": _optional(NUMBER),
    "normalize": _optional(FLAG),
    "rescale": _optional(FLAG),
    **{name: _optional(NUMBER) for name in ("t", "eps", "max_iter", "tol")},
    **{name: _optional(FLAG) for name in FLAGS},
    "int8_mask": _optional(FLAG),
    "scope": _optional(_member(Scope)),
    "threshold_ties": _optional(_member(ThresholdTies)),
}
MODEL = {"model": _required(REFERENCE), "parameters": _parameters(MODEL_PARAMETERS)}
RECIPE = {
    "merge_method": _required(TEXT),
    "models": _required(core_schema.list_schema(_mapping(MODEL), strict=True, min_length=1)),
    "base_model": _optional(REFERENCE),
    "dtype": _optional(TYPE),
    "out_dtype": _optional(TYPE),
    "parameters": _parameters(TOP_PARAMETERS),
    "preset": _otherwise(Preset.MERGEKIT, _member(Preset)),
    "seed": _otherwise(0, SEED),
}


@cache
def _grammar() -> SchemaValidator:
    return SchemaValidator(_mapping(RECIPE))


def validate(data: object) -> tuple[RecipeData | None, list[str], set[str]]:
    """The recipe, every problem as a sentence, and the places whose value is not the recipe's own.

    Where the recipe is wrong a neutral value stands; None when too little is left.
    """
    if not isinstance(data, dict):
        return None, [f"a recipe is a mapping with merge_method and models, not {_kind(data)}"], set()
    problems = [f"{key} is not supported yet" for key in UNSUPPORTED_KEYS if key in data]
    kept = {key: value for key, value in data.items() if key not in UNSUPPORTED_KEYS}
    unusable: set[str] = set()
    if problems and "models" not in kept:
        # slices or modules stand for models, whose absence is then no problem of its own.
        kept["models"] = [_neutral(0)]
        unusable.add("models[0].model")
    kept = _without_null_parameters(kept)
    try:
        return _grammar().validate_python(kept), problems, unusable
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems += [_sentence(detail) for detail in details]
    for detail in details:
        _mend(kept, detail, unusable)
    try:
        return _grammar().validate_python(kept), problems, unusable
    except ValidationError:
        return None, problems, unusable


def _neutral(key: int | str) -> Any:
    """What causes no further problem in place of a wrong value; a number stands for one of `models`."""
    parameters = {"weight": 1.0}
    if isinstance(key, int):
        return {"model": ".", "parameters": parameters}
    numbers = dict.fromkeys(("weight", "density", "lambda"), 1.0)
    texts = {"merge_method": "-", "model": ".", "base_model": "."}
    return {**numbers, **texts, "parameters": parameters}.get(key)


def _mend(data: Any, detail: ErrorDetails, unusable: set[str]) -> None:
    """Take the value that `detail` complains of out of `data`."""
    *path, key = detail["loc"]
    for step in path:
        data = data[step]
    neutral = None if detail["type"] == "extra_forbidden" else _neutral(key)
    if neutral is not None:
        data[key] = neutral
    else:
        data.pop(key, None)
        if path and path[-1] == "parameters":
            data.setdefault("weight", 1.0)  # which may be what the unknown key was meant to be
    unusable.add(_place((*path, key, "model") if isinstance(key, int) else (*path, key)))


def _without_null_parameters(data: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """`parameters:` with nothing after it means none, as in mergekit."""
    cleaned = {key: value for key, value in data.items() if key != "parameters" or value is not None}
    if isinstance(cleaned.get("models"), list):
        cleaned["models"] = [
            _without_null_parameters(m) if isinstance(m, dict) else m for m in cleaned["models"]
        ]
    return cleaned


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
    where = _place(detail["loc"])
    value = detail.get("input")
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"], where)
    if kind == "missing":
        return f"{where}: this key is required"
    if kind in ("finite_number", "form", "choice"):
        return f"{where}: {detail['msg']}" if kind != "finite_number" else f"{where}: {value} is not finite"
    wanted = {
        "float_type": "a number",
        "bool_type": "true or false",
        "int_type": "a whole number",
        "string_type": "text",
        "list_type": "a list",
        "dict_type": "a mapping",
        "too_short": "a list with at least one entry",
        "string_too_short": "text that is not empty",
        "greater_than_equal": "a number from 0 to 2**64 - 1",
        "less_than": "a number from 0 to 2**64 - 1",
        "int_parsing_size": "a number from 0 to 2**64 - 1",
    }.get(kind)
    if wanted is None:
        return f"{where}: {detail['msg']}"
    return f"{where}: expected {wanted}, found {_kind(value)} ({reprlib.repr(value)})"


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _unknown_key(loc: tuple[int | str, ...], where: str) -> str:
    key, parent = str(loc[-1]), loc[:-1]
    if parent and parent[-1] == "parameters":
        known = TOP_PARAMETERS if len(parent) == 1 else MODEL_PARAMETERS
        if len(parent) > 1 and key in TOP_PARAMETERS:
            return f"{where}: {key} holds for the whole merge; give it under the top-level parameters"
        if key in UNSUPPORTED_PARAMETERS:
            return f"{where}: the parameter {key} is not supported yet"
        if key in RECIPE:
            return f"{where}: {key} is no parameter; give it at the top of the recipe"
    else:
        known = MODEL if parent else RECIPE
        if not parent and key in TOP_PARAMETERS:
            return f"{where}: {key} is a parameter; give it under parameters"
    from difflib import get_close_matches  # late: only for what is wrong

    near = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{where}: unknown key {reprlib.repr(key)}; {hint}"
