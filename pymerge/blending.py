"""The parameters of single methods: checked, and made what a rule says of a blend."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from pymerge.rule import Blend, Blending, Vectors

Option: TypeAlias = "bool | float"

MOST_TURNS = 1_000_000

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
    }
)


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
    if name in ("eps", "tol") and value < 0:
        return f"is {value!r}, expected at least 0"
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
