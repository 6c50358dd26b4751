"""What a backend is asked to do: for each tensor, where its inputs lie and where the result goes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from pymerge.dtypes import DType
from pymerge.rule import Rule, Trim, Vectors, passes

IN_MEMORY = -1


class Region(NamedTuple):
    """Contiguous elements: `start` is a byte offset in file number `file`, or an address (IN_MEMORY)."""

    dtype: DType
    start: int
    file: int = IN_MEMORY


class Product(NamedTuple):
    """`base` of `rows` x `width` elements plus `scale` * (left @ right), where left has `rank` columns.

    Summed up the rank in float32 (float64 for a float64 base) and rounded to the base's type once.
    `transposed`: the files hold `left` and `right` with rows and columns exchanged.
    """

    base: Region
    left: Region
    right: Region
    rows: int
    width: int
    rank: int
    scale: float
    transposed: bool

    @property
    def dtype(self) -> DType:
        """The element type: the base's."""
        return self.base.dtype


MEAN_OF_ALL = -1


@dataclass(frozen=True, slots=True)
class RowTable:
    """Which rows a tensor is put together from, in runs.

    `runs`: pairs of (first row, number of terms), in ascending order from row 0. `terms`: pairs of (source,
    its row) for the first row of each run; what follows goes on from there. A row is the mean of its terms,
    summed in their order; without terms it is zero; with MEAN_OF_ALL it is the mean of the first `averaged`
    rows, summed in float64.
    """

    runs: array[int]
    terms: array[int]
    averaged: int = 0


class Rows(NamedTuple):
    """A tensor of rows of `width` elements from `sources`, computed in float32 and rounded to `dtype`."""

    dtype: DType
    width: int
    sources: tuple[Region | Product, ...]
    table: RowTable


# Where the elements of an input come from.
Source: TypeAlias = Region | Product | Rows


def regions_of(source: Source) -> Iterator[Region]:
    """Every stretch of a file, or of memory, that a source reads."""
    if isinstance(source, Region):
        yield source
    elif isinstance(source, Product):
        yield from (source.base, source.left, source.right)
    else:
        for part in source.sources:
            yield from regions_of(part)


def products_of(source: Source) -> Iterator[Product]:
    """Every product that a source reads."""
    if isinstance(source, Product):
        yield source
    elif isinstance(source, Rows):
        yield from (part for part in source.sources if isinstance(part, Product))


def bytes_of(source: Source, count: int) -> int:
    """Bytes that reading the `count` elements of a source takes, of files and of memory."""
    if isinstance(source, Region):
        return count * source.dtype.itemsize
    if isinstance(source, Product):
        left, right = source.left.dtype.itemsize * source.rows, source.right.dtype.itemsize * source.width
        return count * source.dtype.itemsize + source.rank * (left + right)
    return _bytes_of_rows(source, count // source.width)


def _bytes_of_rows(rows: Rows, height: int) -> int:
    table, total, term = rows.table, 0, 0
    for at in range(0, len(table.runs), 2):
        first, terms = table.runs[at : at + 2]
        length = (table.runs[at + 2] if at + 2 < len(table.runs) else height) - first
        for _ in range(max(terms, 0)):
            total += length * rows.width * rows.sources[table.terms[2 * term]].dtype.itemsize
            term += 1
    return 2 * total if table.runs[-1] == MEAN_OF_ALL else total


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One output tensor of `count` elements.

    `rule` None: all inputs must hold the same bytes, which are copied (integers, bool).
    `cast`: inputs are rounded to this type before any arithmetic (mergekit's `dtype`); None: as stored.
    `row`: elements of a row, for rules that take rows or columns one by one; 0: all of them.
    """

    name: str
    count: int
    base: Source | None
    experts: tuple[Source, ...]
    out: Region
    rule: Rule | None
    cast: DType | None = None
    row: int = 0

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The base, where there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of the inputs, all the same, are the result."""
        if self.rule is None:
            return True
        return self.rule.copy and {self.experts[0].dtype, self.cast or self.out.dtype} == {self.out.dtype}

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
