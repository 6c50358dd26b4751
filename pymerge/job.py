"""What a backend is asked to do: for each tensor, where its inputs lie and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pymerge.dtypes import DType
from pymerge.rule import Rule

IN_MEMORY = -1


class Region(NamedTuple):
    """Contiguous elements: `start` is a byte offset in file number `file`, or an address (IN_MEMORY)."""

    dtype: DType
    start: int
    file: int = IN_MEMORY


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One output tensor of `count` elements.

    `rule` None: all inputs must hold the same bytes, which are copied (integers, bool).
    `cast`: inputs are rounded to this type before any arithmetic (mergekit's `dtype`); None: as stored.
    """

    name: str
    count: int
    base: Region | None
    experts: tuple[Region, ...]
    out: Region
    rule: Rule | None
    cast: DType | None = None
