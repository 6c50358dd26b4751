"""The grammar of `tokenizer`, and what becomes of it once the models are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypedDict

from pydantic_core import PydanticCustomError, core_schema

from pymerge.adapted import TokenizerRule, TokenRule
from pymerge.recipe_values import (
    REFERENCE,
    TEXT,
    Form,
    Key,
    Reference,
    mapping,
    optional,
    otherwise,
    required,
)

UNION, BASE = "union", "base"
# Tags of a choice of forms, which locations hold too.
_MODEL, _KIND = "<model>", "<kind>"
TOKENIZER_TAGS = (_MODEL, _KIND)


class TokenData(TypedDict):
    """One checked entry of `tokenizer.tokens`."""

    source: Reference | dict[str, Any]
    force: bool


class TokenizerData(TypedDict):
    """A checked `tokenizer`."""

    source: Reference
    tokens: dict[str, TokenData] | None
    pad_to_multiple_of: int | None


def _kinds(found: dict[str, Any]) -> dict[str, Any]:
    named = [key for key in ("model", "token", "token_id") if found[key] is not None]
    if found["kind"] == "zero" and named:
        raise PydanticCustomError("form", "kind zero takes no {key}", {"key": named[0]})
    if found["kind"] == "model_token" and (found["model"] is None or len(named) != 2):
        raise PydanticCustomError("form", "kind model_token takes a model and one of token and token_id")
    return found


_whole = core_schema.int_schema(strict=True, ge=0, lt=2**31)
_at_least_one = core_schema.int_schema(strict=True, ge=1, lt=2**31)
KIND_KEYS: dict[str, Key] = {
    "kind": required(core_schema.literal_schema(["model_token", "zero"])),
    "model": optional(REFERENCE),
    "token": optional(TEXT),
    "token_id": optional(_whole),
}
_kind: Form = core_schema.no_info_after_validator_function(_kinds, mapping(KIND_KEYS))
_source: Form = core_schema.tagged_union_schema(
    {_MODEL: REFERENCE, _KIND: _kind},
    lambda value: _KIND if isinstance(value, dict) and "kind" in value else _MODEL,
)
TOKEN_KEYS: dict[str, Key] = {
    "source": required(_source),
    "force": otherwise(False, core_schema.bool_schema(strict=True)),
}
TOKENIZER_KEYS: dict[str, Key] = {
    "source": otherwise(Reference(UNION), REFERENCE),
    "tokens": optional(core_schema.dict_schema(TEXT, mapping(TOKEN_KEYS), strict=True)),
    "pad_to_multiple_of": optional(_at_least_one),
}
TOKENIZER: Form = mapping(TOKENIZER_KEYS)


def known_keys(names: list[str]) -> dict[str, Key]:
    """The keys of the mapping under `tokenizer` whose place is `names`."""
    return {1: TOKENIZER_KEYS, 3: TOKEN_KEYS}.get(len(names), KIND_KEYS)


def tokenizer_data(tokenizer: TokenizerData | None, source: Reference | None) -> TokenizerData | None:
    """`tokenizer_source` is an old form of `tokenizer`."""
    if tokenizer is None and source is not None:
        return {"source": source, "tokens": None, "pad_to_multiple_of": None}
    return tokenizer


def references_of(data: TokenizerData | None) -> Iterator[tuple[str, Reference]]:
    """Every model that is named under `tokenizer`, and its place."""
    if data is None:
        return
    if data["source"].text not in (UNION, BASE):
        yield "tokenizer.source", data["source"]
    for token, given in (data["tokens"] or {}).items():
        if (model := _model_of(given)) is not None:
            yield f"tokenizer.tokens.{token}.source", model


def rule_of(data: TokenizerData | None, path_of: Callable[[Reference, str], Any]) -> TokenizerRule | None:
    """The rule, with the models' paths."""
    if data is None:
        return None
    source = data["source"]
    tokens = {}
    for token, given in (data["tokens"] or {}).items():
        model = _model_of(given)
        found = given["source"] if isinstance(given["source"], dict) else {}
        path = None if model is None else path_of(model, f"tokenizer.tokens.{token}.source")
        name = found.get("token") if found else token
        tokens[token] = TokenRule(path, name, found.get("token_id"), given["force"])
    named = source.text not in (UNION, BASE)
    return TokenizerRule(
        path_of(source, "tokenizer.source") if named else None,
        source.text == UNION,
        tokens,
        data["pad_to_multiple_of"] or 1,
    )


def _model_of(given: TokenData) -> Reference | None:
    source = given["source"]
    return source["model"] if isinstance(source, dict) else source
