"""What a backend is asked to do: for each tensor, where its inputs lie and where the result goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pymerge.dtypes import DType
from pymerge.rule import Rule, Trim, Vectors, passes

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
    `row`: elements of a row, for rules that take rows or columns one by one; 0: all of them.
    """

    name: str
    count: int
    base: Region | None
    experts: tuple[Region, ...]
    out: Region
    rule: Rule | None
    cast: DType | None = None
    row: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of the inputs, all the same, are the result."""
        if self.rule is None:
            return True
        types = {self.experts[0].dtype, self.cast or self.out.dtype}
        return self.rule.copy and types == {self.out.dtype}

    @property
    def reads(self) -> int:
        """How often the inputs are read."""
        if self.rule is None or self.is_copy:
            return 1
        vectors = self.rule.blend.vectors if self.rule.blend else Vectors.TENSOR
        if vectors is Vectors.COLUMNS and self.row > 1:
            return passes(self.rule)
        return passes(self.rule, self.row if vectors is Vectors.ROWS else self.count)


def row_of(shape: Sequence[int], rule: Rule) -> int:
    """What `TensorJob.row` is for a tensor of this shape."""
    vectors = rule.blend.vectors if rule.blend else Vectors.TENSOR
    if vectors is Vectors.ROWS or rule.trim in (Trim.RANKED, Trim.IMPORTANCE):
        return shape[-1] if shape else 1
    return math.prod(shape[1:]) if vectors is Vectors.COLUMNS else 0
