"""Where inputs lie, as the core takes it: rows of numbers, and those that no file holds as they are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from pymerge.dtypes import DType
from pymerge.job import Product, Region, Rows, Source

_COMPOUND = -2


def dtype_code(dtype: DType | None) -> int:
    """The core's number for an element type; -1 for none."""
    return -1 if dtype is None or dtype.code is None else dtype.code


# Looked up, because a mixture of experts has a third of a million regions.
_KINDS = {dtype: (dtype.itemsize, dtype_code(dtype)) for dtype in DType if dtype.bits % 8 == 0}


class CompoundTable:
    """Numbers the compounds of one run; `slots`: the core's number of each file."""

    def __init__(self, slots: Mapping[int, int]) -> None:
        self.rows: list[dict[str, object]] = []
        self._slots = slots

    def regions(self, sources: Iterable[Source]) -> array[int]:
        """Rows of (start, slot, item bytes, dtype code), one after the other."""
        slots, kinds = self._slots, _KINDS
        return array(
            "q",
            [
                number
                for source in sources
                for number in (
                    (source.start, slots[source.file], *kinds[source.dtype])
                    if isinstance(source, Region)
                    else (self._number(source), _COMPOUND, *kinds[source.dtype])
                )
            ],
        )

    def _number(self, source: Product | Rows) -> int:
        row = self._rows(source) if isinstance(source, Rows) else self._product(source)
        self.rows.append(row)
        return len(self.rows) - 1

    def _rows(self, rows: Rows) -> dict[str, object]:
        return {
            "width": rows.width,
            "sources": self.regions(rows.sources),
            "runs": rows.table.runs,
            "terms": rows.table.terms,
            "averaged": rows.table.averaged,
        }

    def _product(self, product: Product) -> dict[str, object]:
        return {
            "width": product.width,
            "sources": self.regions((product.base, product.left, product.right)),
            "rows": product.rows,
            "rank": product.rank,
            "scale": product.scale,
            "transposed": product.transposed,
        }
