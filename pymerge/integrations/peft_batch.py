"""The merges of a whole PEFT adapter, gathered while PEFT asks for them one by one and made in few calls.

PEFT gets empty tensors at once; they are filled before `add_weighted_adapter` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError
from pymerge.integrations.calls import why_left
from pymerge.integrations.patches import Function, Patches, Tally

if TYPE_CHECKING:
    from torch import Tensor

# torch adds up more in an order of its own, so bits would differ.
MOST_SUMMED = 4
# What PEFT's methods are called here.
RULES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ties": {"method": "ties", "preset": "peft"},
        "magnitude_prune": {"method": "breadcrumbs", "gamma": 0.0},
    }
)
# Zero times such an entry is NaN in PEFT.
NOT_FINITE = "an entry that is not finite"
# The method of LoraModel that merges the two tensors of one layer.
ONE_LAYER = "_generalized_task_arithmetic_weighted_adapter"


@dataclass(slots=True)
class Asked:
    """One merge of `tensors`, all of one shape; `out` is what PEFT puts into the adapter."""

    method: str
    tensors: list[Tensor]
    weights: tuple[float, ...]
    density: float
    given: tuple[Any, ...]  # the arguments of PEFT's function
    out: Tensor

    @property
    def kind(self) -> tuple[object, ...]:
        """What the merges of one call have in common."""
        return self.method, self.tensors[0].dtype, self.out.dtype, self.weights, self.density


class Gathering:
    """What one call of `add_weighted_adapter` has asked for so far."""

    def __init__(self, originals: Mapping[str, Function], tally: Tally) -> None:
        self._originals, self._tally = originals, tally
        self._asked: list[Asked] = []
        self._of_layer: list[Asked | None] | None = None

    def take(self, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
        """An empty tensor for the result; None where the merge has to be made at once."""
        import torch

        if self._of_layer is None:
            return None
        try:
            asked = _asked(method, *given, **named) if method in RULES else None
        except (AttributeError, TypeError):  # another version of PEFT passes something else
            asked = None
        self._of_layer.append(asked)
        if asked is None:
            return None
        asked.out = torch.empty_like(asked.tensors[0], memory_format=torch.contiguous_format)
        self._asked.append(asked)
        return asked.out

    @contextmanager
    def layer(self) -> Iterator[Callable[[Sequence[Tensor]], None]]:
        """While PEFT merges one layer; what it yields is told the tensors that come of it."""
        found: list[Asked | None] = []
        self._of_layer = found

        def settle(results: Sequence[Tensor]) -> None:
            for asked, result in zip(found, results, strict=False):
                if asked is not None:
                    asked.out = result  # another one than was handed out where PEFT has converted it

        try:
            yield settle
        finally:
            self._of_layer = None

    def finish(self) -> None:
        """Fills every tensor that was handed out."""
        import torch

        kinds: dict[object, list[Asked]] = {}
        for asked in self._asked:
            kinds.setdefault(asked.kind, []).append(asked)
        with torch.no_grad():
            for batch in kinds.values():
                self._make(batch)

    def _make(self, batch: Sequence[Asked]) -> None:
        first = batch[0]
        reasons: list[str | None] = [None] * len(batch)
        try:
            merge_at_once(
                first.method,
                [asked.tensors for asked in batch],
                [asked.out for asked in batch],
                first.weights,
                first.density,
            )
            reasons = [None if is_finite(asked.out) else NOT_FINITE for asked in batch]
        except PymergeError as error:
            reasons = [str(error)] * len(batch)
        for asked, reason in zip(batch, reasons, strict=True):
            if reason is None:
                self._tally.make(asked.method)
            else:
                self._tally.leave(asked.method, reason)
                asked.out.copy_(self._originals[asked.method](*asked.given))


def patch(patches: Patches, model: Any, originals: Mapping[str, Function]) -> ContextVar[Gathering | None]:
    """Makes LoraModel gather, where it has the methods that are known; the variable says into what."""
    running: ContextVar[Gathering | None] = ContextVar("gathering", default=None)
    lora = model.LoraModel
    if hasattr(lora, ONE_LAYER):
        patches.replace(lora, ONE_LAYER, lambda theirs, _: _layer(theirs, running))
        patches.replace(
            lora, "add_weighted_adapter", lambda theirs, tally: _whole(theirs, running, originals, tally)
        )
    return running


def _whole(
    theirs: Function, running: ContextVar[Gathering | None], originals: Mapping[str, Function], tally: Tally
) -> Function:
    @wraps(theirs)
    def add_weighted_adapter(*given: Any, **named: Any) -> Any:
        gathering = Gathering(originals, tally)
        token = running.set(gathering)
        try:
            return theirs(*given, **named)
        finally:
            running.reset(token)
            gathering.finish()

    return add_weighted_adapter


def _layer(theirs: Function, running: ContextVar[Gathering | None]) -> Function:
    @wraps(theirs)
    def merge(*given: Any, **named: Any) -> Any:
        gathering = running.get()
        if gathering is None:
            return theirs(*given, **named)
        with gathering.layer() as settle:
            results = theirs(*given, **named)
            settle(results)
        return results

    return merge


def _asked(
    method: str, tensors: list[Tensor], weights: Tensor, density: float, majority: str = "total"
) -> Asked | None:
    """The merge, if it can be gathered."""
    import torch

    size = tensors[0].numel() if tensors else 0
    if not 1 <= len(tensors) <= MOST_SUMMED or majority != "total":
        return None
    if weights.dtype is not torch.float32 or weights.shape != (len(tensors),) or weights.requires_grad:
        return None
    if not isinstance(density, float) or not 0 < density < 1 or int(density * size) == 0:
        return None
    if tensors[0].device.type != "cpu":
        return None
    with torch.no_grad():
        if why_left(tensors) is not None:
            return None
    given = (list(tensors), weights, density, *((majority,) if method == "ties" else ()))
    return Asked(method, given[0], tuple(weights.tolist()), density, given, tensors[0])


def merge_at_once(
    method: str,
    tensors: Sequence[Sequence[Tensor]],
    outs: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
) -> None:
    """Merges the tensors of each result into `outs`, with PEFT's bits where they come out finite.

    `method`: one of RULES, voting by mass. `outs`: of one type. Of each tensor the int(density * n) largest
    entries are kept, the first of equals. Raises PymergeError.
    """
    import torch

    from pymerge.tensors import merge_tensors

    names = [str(k) for k in range(len(outs))]
    sizes = [out.numel() for out in outs]
    zeros = torch.zeros(max(sizes), dtype=tensors[0][0].dtype, device=outs[0].device)
    inputs = zip(*([tensor.reshape(-1) for tensor in row] for row in tensors), strict=True)
    merge_tensors(
        {name: zeros[:size] for name, size in zip(names, sizes, strict=True)},
        [dict(zip(names, row, strict=True)) for row in inputs],
        weight=weights,
        density=density,
        out={name: out.view(-1) for name, out in zip(names, outs, strict=True)},
        out_dtype=outs[0].dtype,
        threads=torch.get_num_threads(),
        **RULES[method],
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are, and their sum."""
    import torch

    return math.isfinite(tensor.sum(dtype=torch.float32))
