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
from typing import TYPE_CHECKING, Any

from pymerge.errors import PymergeError
from pymerge.integrations.calls import why_left
from pymerge.integrations.patches import Function, Patches, Tally

if TYPE_CHECKING:
    from torch import Tensor

# torch adds up more in an order of its own, so bits would differ.
MOST_SUMMED = 4
# Trimmed entries at a time: they stay in the cache, and the memory is the same one for all.
BATCH = 1 << 21
METHODS = ("ties", "magnitude_prune")
# Zero times such an entry is NaN in PEFT.
NOT_FINITE = "an entry that is not finite"
# The method of LoraModel that merges the two tensors of one layer.
ONE_LAYER = "_generalized_task_arithmetic_weighted_adapter"


@dataclass(slots=True)
class Asked:
    """One merge of `tensors`, all of one shape; `out` is what PEFT puts into the adapter."""

    method: str
    tensors: list[Tensor]
    weights: Tensor
    density: float
    majority: str
    out: Tensor

    @property
    def count(self) -> int:
        """Elements of the result."""
        return int(self.tensors[0].numel())

    @property
    def kind(self) -> tuple[object, ...]:
        """What the merges of one call have in common."""
        return self.tensors[0].dtype, len(self.tensors), self.density, self.scale

    @property
    def scale(self) -> float | None:
        """A weight that all share and that rounds nothing, so that it may as well multiply the result."""
        weight, *others = set(self.weights.tolist())
        exact = not others and abs(math.frexp(weight)[0]) == 0.5  # a power of two
        return weight if exact and self.method == "ties" and self.majority == "total" else None

    @property
    def given(self) -> tuple[Any, ...]:
        """The arguments of PEFT's function."""
        return self.tensors, self.weights, self.density, *((self.majority,) if self.method == "ties" else ())


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
            asked = _asked(method, *given, **named) if method in METHODS else None
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

        with torch.no_grad():
            for batch in _batches(self._asked):
                self._make(batch)

    def _make(self, batch: Sequence[Asked]) -> None:
        try:
            if batch[0].scale is not None:
                results = _merged_at_once(batch, batch[0].scale)
            else:
                results = [_merged(asked, rows) for asked, rows in zip(batch, _trimmed(batch), strict=True)]
        except PymergeError as reason:
            results = [str(reason)] * len(batch)
        for asked, result in zip(batch, results, strict=True):
            if isinstance(result, str):
                self._tally.leave(asked.method, result)
                result = self._originals[asked.method](*asked.given)
            else:
                self._tally.make(asked.method)
            asked.out.copy_(result)


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
    if not 1 <= len(tensors) <= MOST_SUMMED or majority not in ("total", "frequency"):
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
    return Asked(method, list(tensors), weights, density, majority, tensors[0])


def _batches(asked: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Runs of one element type and one density, of up to BATCH entries or a single merge."""
    batch: list[Asked] = []
    size = 0
    for one in asked:
        entries = len(one.tensors) * one.count
        if batch and (one.kind != batch[0].kind or size + entries > BATCH):
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += entries
    if batch:
        yield batch


def _merged_at_once(batch: Sequence[Asked], scale: float) -> list[Tensor | str]:
    """The results, written where they belong: with one weight for all PEFT's ties is pymerge's."""
    import torch

    from pymerge.tensors import merge_tensors

    names = [str(k) for k in range(len(batch))]
    zeros = torch.zeros(max(asked.count for asked in batch), dtype=batch[0].tensors[0].dtype)
    inputs = zip(*([tensor.reshape(-1) for tensor in asked.tensors] for asked in batch), strict=True)
    merge_tensors(
        {name: zeros[: asked.count] for name, asked in zip(names, batch, strict=True)},
        [dict(zip(names, row, strict=True)) for row in inputs],
        method="ties",
        density=batch[0].density,
        lambda_=scale,
        out={name: asked.out.view(-1) for name, asked in zip(names, batch, strict=True)},
        threads=torch.get_num_threads(),
    )
    return [asked.out if _is_finite(asked.out) else NOT_FINITE for asked in batch]


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are, and their sum."""
    import torch

    return math.isfinite(tensor.sum(dtype=torch.float32))


def _trimmed(batch: Sequence[Asked]) -> list[list[Tensor]]:
    """For each merge its flat tensors with their largest entries, the first of equals, the rest zero."""
    import torch

    from pymerge.tensors import merge_tensors

    flat = [tensor.reshape(-1) for asked in batch for tensor in asked.tensors]
    sizes = [tensor.numel() for tensor in flat]
    names = [str(k) for k in range(len(flat))]
    outs = torch.empty(sum(sizes), dtype=flat[0].dtype).split(sizes)
    zeros = torch.zeros(max(sizes), dtype=flat[0].dtype)
    # With one expert and a base of zeros ties is its trim.
    merge_tensors(
        {name: zeros[:size] for name, size in zip(names, sizes, strict=True)},
        [dict(zip(names, flat, strict=True))],
        method="ties",
        density=batch[0].density,
        normalize=False,
        out=dict(zip(names, outs, strict=True)),
        threads=torch.get_num_threads(),
    )
    each = iter(outs)
    return [[next(each) for _ in asked.tensors] for asked in batch]


def _merged(asked: Asked, rows: Sequence[Tensor]) -> Tensor | str:
    """What PEFT makes of trimmed `rows`, in float32, step by step with its roundings; or why it must."""
    rows = [row.float() for row in rows]
    total = _sum(rows)
    if not _is_finite(total):
        return NOT_FINITE
    weights = asked.weights.tolist()
    if asked.method == "magnitude_prune":
        result = _sum([row * weight for row, weight in zip(rows, weights, strict=True)])
    else:
        votes = total if asked.majority == "total" else _sum([row.sign() for row in rows])
        result = _elected(rows, weights, votes)
    return result.view(asked.tensors[0].shape)


def _elected(rows: Sequence[Tensor], weights: Sequence[float], votes: Tensor) -> Tensor:
    """The weighted sum of the entries that have the sign of `votes`, over their number."""
    import torch

    side = torch.copysign(torch.ones(()), votes + 0.0)  # minus zero elects plus
    agreeing = [(row * side).relu_() for row in rows]
    counts = _sum([entries.sign() for entries in agreeing]).clamp_(min=1)
    weighted = _sum([entries.mul_(weight) for entries, weight in zip(agreeing, weights, strict=True)])
    return weighted.mul_(side).div_(counts)


def _sum(rows: Sequence[Tensor]) -> Tensor:
    """One after the other, as torch sums up to MOST_SUMMED; the first row may come back itself."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total
