"""What the in-memory API needs to know of torch tensors and numpy arrays, in one vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.errors import BackendError

Array: TypeAlias = Any  # a torch.Tensor or a numpy.ndarray; the kind's methods know which


class ArrayKind(Protocol):
    """One library's arrays. `span` is the first address and the one past the last, for contiguous arrays."""

    def dtype(self, array: Array) -> DType: ...
    def shape(self, array: Array) -> tuple[int, ...]: ...
    def count(self, array: Array) -> int: ...
    def span(self, array: Array) -> tuple[int, int]: ...
    def bounds(self, array: Array) -> tuple[int, int]: ...  # the same for any layout
    def is_contiguous(self, array: Array) -> bool: ...
    def contiguous(self, array: Array) -> Array: ...
    def empty(self, like: Array, dtype: DType) -> Array: ...
    def parse_dtype(self, dtype: object) -> DType: ...
    def check_place(self, array: Array, label: str) -> None: ...
    def as_torch(self, array: Array) -> Array: ...


def kind_of(array: object) -> ArrayKind:
    """The kind `array` is of; BackendError if it is neither torch nor numpy."""
    if isinstance(array, np.ndarray):
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return TORCH
    raise BackendError(f"expected a torch tensor or a numpy array, found a {type(array).__name__}")


def _named(name: str) -> DType:
    if name not in BY_TORCH_NAME:
        raise BackendError(f"element type {name} is not supported")
    return BY_TORCH_NAME[name]


def _bounds(start: int, shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, int]:
    """First address and the one past the last of a strided array; `strides` in bytes, of either sign."""
    if 0 in shape:
        return start, start
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + item


class _Numpy:
    def dtype(self, array: Array) -> DType:
        return _named(array.dtype.name)

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def count(self, array: Array) -> int:
        return int(array.size)

    def span(self, array: Array) -> tuple[int, int]:
        start = int(array.ctypes.data)
        return start, start + int(array.nbytes)

    def bounds(self, array: Array) -> tuple[int, int]:
        return _bounds(self.span(array)[0], array.shape, array.strides, array.itemsize)

    def is_contiguous(self, array: Array) -> bool:
        return bool(
            array.flags.c_contiguous
            and array.flags.aligned
            and array.flags.writeable
            and array.dtype.isnative
        )

    def contiguous(self, array: Array) -> Array:
        native = array.dtype.newbyteorder("=")
        return np.require(array, dtype=native, requirements=["C", "A"])

    def empty(self, like: Array, dtype: DType) -> Array:
        return np.empty(like.shape, dtype=_numpy_dtype(dtype))

    def parse_dtype(self, dtype: object) -> DType:
        return dtype if isinstance(dtype, DType) else _named(np.dtype(dtype).name)  # type: ignore[call-overload]

    def check_place(self, array: Array, label: str) -> None:
        pass

    def as_torch(self, array: Array) -> Array:
        import torch

        dtype = self.dtype(array)
        if dtype is DType.BF16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _numpy_dtype(dtype: DType) -> np.dtype[Any]:
    if dtype is not DType.BF16:
        return np.dtype(dtype.torch_name)
    try:
        import ml_dtypes
    except ImportError:
        raise BackendError("bfloat16 numpy arrays need the package ml_dtypes") from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


class _Torch:
    def dtype(self, array: Array) -> DType:
        return _named(str(array.dtype).removeprefix("torch."))

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def count(self, array: Array) -> int:
        return int(array.numel())

    def span(self, array: Array) -> tuple[int, int]:
        start = int(array.data_ptr())
        return start, start + int(array.numel()) * int(array.element_size())

    def bounds(self, array: Array) -> tuple[int, int]:
        item = int(array.element_size())
        return _bounds(int(array.data_ptr()), array.shape, [step * item for step in array.stride()], item)

    def is_contiguous(self, array: Array) -> bool:
        return bool(array.is_contiguous())

    def contiguous(self, array: Array) -> Array:
        return array.detach().resolve_neg().contiguous()

    def empty(self, like: Array, dtype: DType) -> Array:
        import torch

        return torch.empty(like.shape, dtype=getattr(torch, dtype.torch_name), device=like.device)

    def parse_dtype(self, dtype: object) -> DType:
        return dtype if isinstance(dtype, DType) else _named(str(dtype).removeprefix("torch."))

    def check_place(self, array: Array, label: str) -> None:
        import torch

        if array.layout is not torch.strided:
            raise BackendError(f"{label} is a {array.layout} tensor; expected a dense one")
        if array.device.type != "cpu":
            raise BackendError(f"{label} lies on {array.device}; the cpu backend takes tensors on the CPU")
        if array.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                f"{label} requires a gradient, which a merge does not give; use torch.no_grad()"
            )

    def as_torch(self, array: Array) -> Array:
        return array.detach()


NUMPY: ArrayKind = _Numpy()
TORCH: ArrayKind = _Torch()
