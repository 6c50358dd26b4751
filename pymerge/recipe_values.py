"""The forms of single values in recipes: numbers, flags, gradients, conditional lists, names of models."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from pydantic_core import PydanticCustomError, core_schema

from pymerge.dtypes import DType
from pymerge.errors import RecipeError
from pymerge.files import is_path
from pymerge.parameters import EVERY, Case, Conditional, Gradient, merging_dtype

Form: TypeAlias = core_schema.CoreSchema
Key: TypeAlias = core_schema.TypedDictField

# Tags of a choice of forms; a location holds them too, so they must be no key of a recipe.
_ONE, _MANY, _CASE, _CASES = "<one>", "<many>", "<case>", "<cases>"
TAGS = (_ONE, _MANY, _CASE, _CASES)

CASE_KEYS = ("filter", "value")
REFERENCE_KEYS = ("model", "lora", "override_architecture")
PATH_KEYS = ("path", "revision")


class Reference(NamedTuple):
    """A model as the recipe names it. `splits`: the text may hold a revision and a LoRA; else `lora` may."""

    text: str
    revision: str | None = None
    splits: bool = True
    overrides: bool = False
    lora: Reference | None = None


def required(form: Form) -> Key:
    """A key that must be there."""
    return core_schema.typed_dict_field(form, required=True)


def optional(form: Form) -> Key:
    """A key that may be absent, or hold nothing; then None."""
    return otherwise(None, core_schema.nullable_schema(form))


def otherwise(default: object, form: Form) -> Key:
    """A key that may be absent, then `default`."""
    return core_schema.typed_dict_field(core_schema.with_default_schema(form, default=default))


def mapping(keys: dict[str, Key]) -> Form:
    """A mapping with these keys and no other."""
    return core_schema.typed_dict_schema(dict(keys), extra_behavior="forbid")


def listing(form: Form) -> Form:
    """A list of at least one entry."""
    return core_schema.list_schema(form, strict=True, min_length=1)


def member(kind: type[Enum]) -> Form:
    """Text that is the value of one member of an enum."""

    def convert(value: object) -> Enum:
        for candidate in kind:
            if value == candidate.value or value is candidate:
                return candidate
        known = ", ".join(str(candidate.value) for candidate in kind)
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


def _file_name(value: object) -> object:
    if isinstance(value, str) and value and not is_path(value):
        raise PydanticCustomError(
            "form", "{name} cannot be the name of a file", {"name": reprlib.repr(value)}
        )
    return value


def _after(convert: Callable[[Any], object], form: Form) -> Form:
    return core_schema.no_info_after_validator_function(convert, form)


def _varying(one: Form) -> Form:
    """A value, a list of them over the layers, or either by what the tensor's name contains."""

    def kind(value: object) -> str:
        if isinstance(value, dict):
            return _CASE
        if not isinstance(value, list):
            return _ONE
        return _CASES if any(isinstance(item, dict) for item in value) else _MANY

    def either(value: object) -> str:
        return _MANY if isinstance(value, list) else _ONE

    many = _after(lambda values: Gradient(tuple(values)), listing(one))
    value = core_schema.tagged_union_schema({_ONE: one, _MANY: many}, either)
    case = _after(
        lambda found: Case(found["filter"] or EVERY, found["value"]),
        mapping({"filter": optional(core_schema.str_schema(strict=True)), "value": required(value)}),
    )
    forms = {
        _ONE: one,
        _MANY: many,
        _CASE: _after(lambda found: Conditional((found,)), case),
        _CASES: _after(lambda found: Conditional(tuple(found)), listing(case)),
    }
    return core_schema.tagged_union_schema(forms, kind)


def _reference() -> Form:
    def convert(found: dict[str, Any]) -> Reference:
        inner = found["model"]
        overrides = found["override_architecture"] is not None
        lora = None if found["lora"] is None else named(found["lora"])
        return named(inner)._replace(overrides=overrides, lora=lora)

    def named(found: str | dict[str, Any]) -> Reference:
        if isinstance(found, str):
            return Reference(found)
        return Reference(found["path"], found["revision"], splits=False)

    def kind(value: object) -> str:
        return _CASE if isinstance(value, dict) else _ONE

    name = core_schema.no_info_before_validator_function(_file_name, TEXT)
    path = mapping({"path": required(name), "revision": optional(TEXT)})
    keys = {
        "model": required(core_schema.tagged_union_schema({_ONE: name, _CASE: path}, kind)),
        "lora": optional(core_schema.tagged_union_schema({_ONE: name, _CASE: path}, kind)),
        "override_architecture": optional(TEXT),
    }
    forms = {_ONE: _after(Reference, name), _CASE: _after(convert, mapping(keys))}
    return core_schema.tagged_union_schema(forms, kind)


def _layers(value: object) -> range:
    ends = value if isinstance(value, (list, tuple)) else ()
    if len(ends) == 2 and all(type(end) is int for end in ends) and 0 <= ends[0] < ends[1]:
        return range(*ends)
    raise PydanticCustomError(
        "form",
        "expected two layer numbers [first, last + 1], found {value}",
        {"value": reprlib.repr(value)},
    )


TEXT = core_schema.str_schema(strict=True, min_length=1)
NUMBER = _varying(core_schema.float_schema(strict=True, allow_inf_nan=False))
FLAG = _varying(core_schema.bool_schema(strict=True))
REFERENCE = _reference()
LAYERS = core_schema.no_info_plain_validator_function(_layers)
TYPE = core_schema.no_info_plain_validator_function(_dtype)
SEED = core_schema.int_schema(strict=True, ge=0, lt=2**64)
