"""The parameters of single methods: checked, and made what a rule says of a blend or a fuse."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from pymerge.rule import Blend, Blending, Fuse, Fusing, Vectors

Option: TypeAlias = "bool | float"

MOST_TURNS = 1_000_000
MOST_VOTES = 65_536

# Parameter -> what it is where a recipe is silent (None: it must be given).
DEFAULTS: Mapping[str, Option | None] = MappingProxyType(
    {
        "t": None,
        "nuslerp_flatten": True,
        "nuslerp_row_wise": False,
        "normalize_weights": True,
        "eps": 1e-8,
        "max_iter": 10,
        "tol": 1e-5,
        "filter_wise": False,
        "scale": 1.0,
        "epsilon": 1e-5,
        "r": 0.1,
        "alpha": 0.2,
        "select_topk": 1.0,
        "claim": 0.4,
        "votes": 2,
    }
)
_NOT_NEGATIVE = ("eps", "tol", "epsilon", "alpha", "claim")


def complete(own: tuple[str, ...], given: Mapping[str, object], problems: list[str]) -> dict[str, Option]:
    """A value for each of a method's `own` parameters; what is missing or out of range is a problem."""
    values: dict[str, Option] = {}
    for name in own:
        value = given.get(name)
        if value is None:
            value = DEFAULTS[name]
        fault = "must be given" if value is None else _fault(name, value)
        if fault:
            problems.append(f"{name} {fault}")
            value = 0
        values[name] = value  # type: ignore[assignment]
    return values


def _fault(name: str, value: object) -> str | None:
    if isinstance(DEFAULTS[name], bool):
        return None if isinstance(value, bool) else f"is {value!r}, expected true or false"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 3.4e38:
        return f"is {value!r}, which is not a finite number in float32"
    if name in _NOT_NEGATIVE and value < 0:
        return f"is {value!r}, expected at least 0"
    if name == "select_topk" and not 0 <= value <= 1:
        return f"is {value!r}, which is outside 0 to 1"
    if name == "votes" and not (value == int(value) and 1 <= value <= MOST_VOTES):
        return f"is {value!r}, expected a whole number from 1 to {MOST_VOTES:,}"
    if name == "max_iter" and not (value == int(value) and 0 <= value <= MOST_TURNS):
        return f"is {value!r}, expected a whole number from 0 to {MOST_TURNS:,}"
    return None


def blending(kind: Blend, values: Mapping[str, Option]) -> Blending:
    """What a rule says of the blend; `values` as `complete` makes them."""
    vectors = Vectors.TENSOR
    if values.get("filter_wise"):
        vectors = Vectors.ROWS
    elif not values.get("nuslerp_flatten", True):
        vectors = Vectors.COLUMNS if values["nuslerp_row_wise"] else Vectors.ROWS
    return Blending(
        kind,
        vectors,
        t=float(values.get("t", 0.0)),
        eps=float(values.get("eps", 1e-8)),
        max_iter=int(values.get("max_iter", 10)),
        tol=float(values.get("tol", 1e-5)),
    )


def fusing(kind: Fuse, values: Mapping[str, Option]) -> Fusing:
    """What a rule says of the fuse; `values` as `complete` makes them."""
    number = {Fuse.SWAP: "t", Fuse.OVERLAP: "epsilon", Fuse.CONSENSUS: "claim"}.get(kind)
    boosted = values.get("alpha", 0.0) != 0  # a boost of at most 0 is none
    return Fusing(
        kind,
        t=float(values[number]) if number else 0.0,
        boost=float(values.get("r", 0.0)) if boosted else 0.0,
        most_boost=float(values.get("alpha", 0.0)),
        votes=int(values.get("votes", 0)),
    )
