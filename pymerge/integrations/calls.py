"""One merge that another tool asks for, in the words of merge_tensors: checked, carried out, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pymerge.errors import PymergeError
from pymerge.integrations.patches import Left, Tally

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEEDS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Call:
    """`method`, `base`, `experts` and `options` are merge_tensors'; all tensors have one shape.

    `drawn`: whether it needs a seed, which is drawn from torch's generator, so that torch.manual_seed decides
    as it does in the other tool. `stacked`: each tensor holds the inputs of several merges along its first
    axis, and so does the result.
    """

    method: str
    base: Tensor | None
    experts: Sequence[Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False
    stacked: bool = False


def attempt(tally: Tally, method: str, read: Callable[[], Call]) -> Tensor | None:
    """What the call that `read` gives amounts to; None, and counted, where it is left to the other tool."""
    try:
        result = run(_read(read))
    except (Left, PymergeError) as reason:
        tally.leave(method, str(reason))
        return None
    tally.make(method)
    return result


def run(call: Call) -> Tensor:
    """The merged tensor. Raises Left for tensors that belong to the other tool, PymergeError."""
    import torch

    from pymerge.tensors import merge_tensors

    tensors = [*call.experts] if call.base is None else [call.base, *call.experts]
    reason = why_left(tensors)
    if reason is not None:
        raise Left(reason)
    options: dict[str, Any] = {
        **call.options,
        "method": call.method,
        "threads": torch.get_num_threads(),
        "backend": _backend_for(tensors[0].device, len(call.experts)),
    }
    if call.drawn:
        options["seed"] = int(torch.randint(SEEDS, ()))
    if not call.stacked:
        return cast("Tensor", merge_tensors(call.base, call.experts, **options))
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    base = None if call.base is None else _rows(call.base)
    merge_tensors(base, [_rows(expert) for expert in call.experts], out=_rows(result), **options)
    return result


def _rows(stacked: Tensor) -> dict[str, Tensor]:
    """The tensors of several merges, named by their numbers."""
    return {str(row): tensor for row, tensor in enumerate(stacked.unbind())}


def why_left(tensors: Sequence[Tensor]) -> str | None:
    """Why these inputs of one merge belong to the other tool; None for those that pymerge takes."""
    import torch

    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a gradient is wanted"
    if any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        return "a tensor of another class"
    if torch.compiler.is_compiling() or any(_has_tangent(tensor) for tensor in tensors):
        return "a gradient is wanted"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor that is not dense"
    if any(tensor.shape != first.shape for tensor in tensors):
        return "tensors of different shapes"
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return "tensors of different element types"
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"element type {str(first.dtype).removeprefix('torch.')}"
    if any(tensor.device != first.device for tensor in tensors):
        return "tensors on different devices"
    if first.device.type not in ("cpu", "cuda"):
        return f"tensors on {first.device.type}"
    return "a tensor without elements" if first.numel() == 0 else None


def _read(read: Callable[[], Call]) -> Call:
    """What `read` gives; what another version of the tool hands over is not worth an error."""
    try:
        return read()
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise Left(f"a call of unknown form: {type(error).__name__}: {error}") from error


def _has_tangent(tensor: Tensor) -> bool:
    """Whether it is differentiated in forward mode."""
    from torch.autograd import forward_ad

    return forward_ad.unpack_dual(tensor).tangent is not None


def _backend_for(device: torch.device, experts: int) -> str:
    from pymerge.tensor_backends import MOST_EXPERTS, Backend, choose_backend

    chosen = choose_backend(None, str(device))
    if chosen is Backend.REFERENCE or (chosen is not Backend.CPU and experts > MOST_EXPERTS):
        raise Left(f"no kernels for {experts} experts on {device.type}")
    return str(chosen.value)
