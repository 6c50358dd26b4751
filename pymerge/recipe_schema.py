"""The recipe's grammar as pydantic models; imported only when a recipe is parsed."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Hashable
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from pymerge.dtypes import DType
from pymerge.errors import RecipeError
from pymerge.files import is_path
from pymerge.parameters import Parameter, Preset, merging_dtype
from pymerge.rule import Scope, ThresholdTies

E = TypeVar("E", bound=Enum)

# Keys of mergekit's grammar that this version refuses by name.
UNSUPPORTED_KEYS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "name")
UNSUPPORTED_PARAMETERS = ("gamma", "epsilon", "select_topk")

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers as YAML 1.2 does.

    So 1e-3 and -.5 are numbers, and 1:30 (base 60 in YAML 1.1) and 2026-01-31 are text.
    """


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _dated = [pair for pair in _resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
    _Loader.yaml_implicit_resolvers[_first] = [("tag:yaml.org,2002:str", _BASE_60), *_dated]


def read_yaml(text: str) -> object:
    """The one YAML document in `text`; RecipeError when it is none, several, or has duplicate keys."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError("the recipe is empty")
        return loader.construct_document(node)
    except yaml.composer.ComposerError as error:
        if "single document" in str(error):
            raise RecipeError("recipes of several YAML documents are not supported yet") from error
        raise RecipeError(_yaml_sentence(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"line {line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_sentence(error)) from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"the recipe is not valid YAML: {type(error).__name__}: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _yaml_sentence(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{line}the recipe is not valid YAML: {getattr(error, 'problem', None) or error}"


def _scalar(value: object) -> object:
    """Refuse the value forms of the grammar that are not covered yet, by name."""
    if isinstance(value, list):
        conditional = any(isinstance(item, dict) for item in value)
        form = "conditional lists (filter, value)" if conditional else "gradients (lists of numbers)"
        raise PydanticCustomError("form", "{form} are not supported yet", {"form": form})
    if isinstance(value, dict):
        raise PydanticCustomError("form", "conditional values (filter, value) are not supported yet")
    return value


def _named(kind: type[E]) -> BeforeValidator:
    """A field whose text is the value of one member of an enum."""

    def convert(value: object) -> E:
        for member in kind:
            if value == member.value or value is member:
                return member
        known = ", ".join(str(member.value) for member in kind)
        raise PydanticCustomError(
            "choice",
            "{value} is not known; known are {known}",
            {"value": reprlib.repr(value), "known": known},
        )

    return BeforeValidator(convert)


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


Number = Annotated[float, BeforeValidator(_scalar), Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_scalar), Field(strict=True)]
Reference = Annotated[str, BeforeValidator(_reference), Field(strict=True, min_length=1)]
Type = Annotated[DType, BeforeValidator(_dtype)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Parameters(_Strict):
    def given(self) -> dict[str, Parameter]:
        """What the recipe states, without what has no effect (int8_mask)."""
        values = self.model_dump(by_alias=True, exclude_none=True, exclude={"int8_mask"})
        return {name: float(v) if type(v) is int else v for name, v in values.items()}


class ModelParameters(_Parameters):
    weight: Number | None = None
    density: Number | None = None
    scale: Number | None = None


class TopParameters(ModelParameters):
    lambda_: Number | None = Field(None, alias="lambda")
    normalize: Flag | None = None
    rescale: Flag | None = None
    t: Number | None = None
    nuslerp_flatten: Flag | None = None
    nuslerp_row_wise: Flag | None = None
    normalize_weights: Flag | None = None
    eps: Number | None = None
    max_iter: Number | None = None
    tol: Number | None = None
    filter_wise: Flag | None = None
    int8_mask: Flag | None = None
    scope: Annotated[Scope, _named(Scope)] | None = None
    threshold_ties: Annotated[ThresholdTies, _named(ThresholdTies)] | None = None


class ModelSchema(_Strict):
    model: Reference
    parameters: ModelParameters = ModelParameters()


class MergeSchema(_Strict):
    merge_method: Annotated[str, Field(strict=True, min_length=1)]
    models: Annotated[list[ModelSchema], Field(strict=True, min_length=1)]
    base_model: Reference | None = None
    dtype: Type | None = None
    out_dtype: Type | None = None
    parameters: TopParameters = TopParameters(**{})
    preset: Annotated[Preset, _named(Preset)] = Preset.MERGEKIT
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] = 0


def validate(data: object) -> tuple[MergeSchema | None, list[str], set[str]]:
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
        return MergeSchema.model_validate(kept), problems, unusable
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems += [_sentence(detail) for detail in details]
    for detail in details:
        _mend(kept, detail, unusable)
    try:
        return MergeSchema.model_validate(kept), problems, unusable
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
        "model_type": "a mapping",
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
    top = _field_names(TopParameters)
    if parent and parent[-1] == "parameters":
        known = top if len(parent) == 1 else _field_names(ModelParameters)
        if len(parent) > 1 and key in top:
            return f"{where}: {key} holds for the whole merge; give it under the top-level parameters"
        if key in UNSUPPORTED_PARAMETERS:
            return f"{where}: the parameter {key} is not supported yet"
    else:
        known = _field_names(ModelSchema if parent else MergeSchema)
        if not parent and key in top:
            return f"{where}: {key} is a parameter; give it under parameters"
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{where}: unknown key {reprlib.repr(key)}; {hint}"


def _field_names(schema: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in schema.model_fields.items()]
