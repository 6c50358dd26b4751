"""Options of the in-memory API as they come from a caller's code: checked, and made plain Python values.

numpy scalars, 0-d arrays and 0-d tensors count as numbers, 1-D ones as lists of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from enum import Enum
from reprlib import repr as short_repr
from typing import SupportsFloat, SupportsIndex, TypeAlias, TypeVar

import numpy as np

from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.errors import RecipeError

PerExpert: TypeAlias = "SupportsFloat | Iterable[SupportsFloat]"
E = TypeVar("E", bound=Enum)

# No count or seed needs more.
MOST_BITS = 64


def as_number(value: object, name: str) -> float:
    """A real number; whether it is finite and in range is the rule's to say."""
    if type(value) in (float, int):  # most of them; protocols take 10 us each to check
        plain: object = value
    else:
        plain = _plain(value, name)
    if isinstance(plain, (float, int, SupportsFloat, SupportsIndex)) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError:
            raise RecipeError(f"{name} is too large for a finite number in float32") from None
        except (TypeError, ValueError):
            pass  # such as a class of numbers
    raise _refusal(name, value, "a number")


def as_count(value: object, name: str) -> int:
    """A whole number; bool is none."""
    plain = _plain(value, name)
    if not isinstance(plain, int) or isinstance(plain, bool):
        raise _refusal(name, value, "a whole number")
    if plain.bit_length() > MOST_BITS:
        raise RecipeError(f"{name} is a number of {plain.bit_length()} bits, expected at most {MOST_BITS}")
    return plain


def as_flag(value: object, name: str) -> bool | None:
    """True, False, or None for the default."""
    plain = _plain(value, name)
    if plain is None or isinstance(plain, bool):
        return plain
    raise _refusal(name, value, "True, False or None")


def as_name(value: object, name: str) -> str:
    """A text that stands for something."""
    if isinstance(value, str):
        return value
    raise _refusal(name, value, "a name")


def as_member(kind: type[E], value: object, name: str) -> E:
    """A member of `kind`, or the text that stands for one."""
    for member in kind:
        if value is member or (isinstance(value, str) and value == member.value):
            return member
    raise _refusal(name, value, " or ".join(str(member.value) for member in kind))


def as_float_dtype(value: object, name: str) -> DType:
    """A type that merges, from its name, a torch or numpy dtype, or a numpy scalar type."""
    text = str(value).removeprefix("torch.")  # a torch dtype without importing torch
    if text not in BY_TORCH_NAME and isinstance(value, (str, type, np.dtype)):
        text = _numpy_name(value)
    dtype = value if isinstance(value, DType) else BY_TORCH_NAME.get(text)
    if dtype is None or not dtype.mergeable:
        raise _refusal(name, value, "a float type of 16, 32 or 64 bits")
    return dtype


def per_expert(value: object, count: int, name: str) -> tuple[float, ...]:
    """`count` numbers: one for all experts, or one for each."""
    plain = _plain(value, name)
    if not isinstance(plain, Iterable):
        return (as_number(plain, name),) * count
    if isinstance(plain, (str, bytes, Mapping, Set)):
        raise _refusal(name, value, "a number, or a list of one for each expert")
    values = list(plain)
    if len(values) != count:
        raise RecipeError(f"{len(values)} values of {name} for {count} experts")
    return tuple(as_number(item, f"{name} of expert {k}") for k, item in enumerate(values))


def _plain(value: object, name: str) -> object:
    """Scalars and arrays of numpy and torch as numbers and lists; anything else as it is."""
    if getattr(value, "requires_grad", False):
        raise RecipeError(f"{name} requires a gradient, which a merge does not give; detach it")
    tolist = getattr(value, "tolist", None)
    if isinstance(value, type) or not callable(tolist):
        return value
    try:
        return tolist()
    except RuntimeError:
        raise RecipeError(f"{name} is a tensor whose values cannot be read") from None


def _numpy_name(value: str | type | np.dtype[np.generic]) -> str:
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError):
        return ""
    return dtype.name if dtype.isnative else ""


def _refusal(name: str, value: object, expected: str) -> RecipeError:
    try:
        shown = " ".join(short_repr(value).split())
    except ValueError:  # Python prints no integers of thousands of digits
        shown = "an integer too long to print"
    return RecipeError(f"{name} is {shown}, expected {expected}")
