"""What the in-memory API needs to know of torch tensors and numpy arrays, in one vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias

import numpy as np

from pymerge.dtypes import BY_TORCH_NAME, DType
from pymerge.errors import BackendError

Array: TypeAlias = Any  # a torch.Tensor or a numpy.ndarray; the kind's methods know which


class ArrayKind(Protocol):
    """One library's arrays. `span` is the first address and the one past the last, for contiguous arrays."""

    name: str

    def fault(self, array: Array) -> str | None: ...  # why no backend takes it, as the end of a sentence
    def out_fault(self, array: Array) -> str | None: ...  # why no backend can write there
    def write_fault(self, array: Array) -> str | None: ...  # why nothing can be copied there
    def device(self, array: Array) -> str: ...
    def shape(self, array: Array) -> tuple[int, ...]: ...
    def count(self, array: Array) -> int: ...
    def span(self, array: Array) -> tuple[int, int]: ...
    def bounds(self, array: Array) -> tuple[int, int]: ...  # the same for any layout
    def strides(self, array: Array) -> tuple[int, ...]: ...  # in bytes
    def contiguous(self, array: Array) -> Array: ...
    def empty(self, like: Array, dtype: DType) -> Array: ...  # of the same shape, on the same device
    def equal(self, a: Array, b: Array) -> bool: ...  # in value or in bits, which NaN can have in common
    def copy(self, source: Array, to: Array) -> None: ...
    def clone(self, array: Array) -> Array: ...
    def as_torch(self, array: Array) -> Array: ...  # in the same memory, where it can be written


def kind_of(array: object) -> ArrayKind | None:
    """The kind `array` is of; None if it is neither torch nor numpy."""
    if isinstance(array, np.ndarray):
        return NUMPY
    torch = sys.modules.get("torch")
    return TORCH if torch is not None and isinstance(array, torch.Tensor) else None


def dtype_of(array: Array) -> DType:
    """The element type of an array of either kind that has one of ours."""
    return BY_TORCH_NAME[dtype_name(array.dtype)]


@cache
def dtype_name(dtype: Any) -> str:
    """The name of a numpy or torch element type; kept, since numpy takes 10 us to put it together."""
    return str(dtype.name) if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _bounds(start: int, shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, int]:
    """First address and the one past the last of a strided array; `strides` in bytes, of either sign."""
    if 0 in shape:
        return start, start
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + item


SHARED = "has several elements at one address"


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements of a strided array may share memory, as expand() and as_strided() make them."""
    if 0 in shape:
        return False
    reach = 0  # of the axes with shorter steps
    axes = ((abs(step), size) for step, size in zip(strides, shape, strict=True) if size > 1)
    for step, size in sorted(axes):
        if step <= reach:
            return True
        reach += step * (size - 1)
    return False


class _Numpy:
    name = "numpy.ndarray"

    def fault(self, array: Array) -> str | None:
        return "is a masked array, whose mask a merge does not know" if np.ma.isMA(array) else None

    def out_fault(self, array: Array) -> str | None:
        flags = array.flags
        if not flags.writeable:
            return "is read-only"
        if not array.dtype.isnative:
            return f"has the foreign byte order of {array.dtype.str}"
        return "must be contiguous and aligned" if not (flags.c_contiguous and flags.aligned) else None

    def write_fault(self, array: Array) -> str | None:
        if fault := self.fault(array):
            return fault
        if not array.flags.writeable:
            return "is read-only"
        return SHARED if _overlaps(array.shape, array.strides) else None

    def device(self, array: Array) -> str:
        return "cpu"

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def count(self, array: Array) -> int:
        return int(array.size)

    def span(self, array: Array) -> tuple[int, int]:
        start = int(array.ctypes.data)
        return start, start + int(array.nbytes)

    def bounds(self, array: Array) -> tuple[int, int]:
        return _bounds(self.span(array)[0], array.shape, array.strides, array.itemsize)

    def strides(self, array: Array) -> tuple[int, ...]:
        return tuple(array.strides)

    def contiguous(self, array: Array) -> Array:
        native = array.dtype.newbyteorder("=")
        return np.require(array, dtype=native, requirements=["C", "A", "E"])

    def empty(self, like: Array, dtype: DType) -> Array:
        return np.empty(like.shape, dtype=_numpy_dtype(dtype))

    def equal(self, a: Array, b: Array) -> bool:
        return np.array_equal(a, b) or (a.shape == b.shape and a.tobytes() == b.tobytes())

    def copy(self, source: Array, to: Array) -> None:
        np.copyto(to, source)

    def clone(self, array: Array) -> Array:
        return array.copy()

    def as_torch(self, array: Array) -> Array:
        import torch

        if not array.flags.writeable:
            array = array.copy()  # torch would warn that it could be written
        elif array.flags.c_contiguous:  # whose axes of one element may have steps that torch refuses
            array = np.ndarray(array.shape, array.dtype, buffer=array)
        if dtype_of(array) is DType.BF16:
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
    name = "torch.Tensor"

    def fault(self, array: Array) -> str | None:
        import torch

        if array.layout is not torch.strided or array.is_nested or not _lies_in_memory(array):
            return (
                f"is a {type(array).__name__} of layout {array.layout} that lies on {array.device};"
                " expected a dense tensor with memory of its own"
            )
        if array.requires_grad and torch.is_grad_enabled():
            return "requires a gradient, which a merge does not give; use torch.no_grad()"
        return None

    def out_fault(self, array: Array) -> str | None:
        return None if array.is_contiguous() and not array.is_neg() else "must be contiguous"

    def write_fault(self, array: Array) -> str | None:
        return self.fault(array) or (SHARED if _overlaps(array.shape, array.stride()) else None)

    def device(self, array: Array) -> str:
        return str(array.device)

    def shape(self, array: Array) -> tuple[int, ...]:
        return tuple(array.shape)

    def count(self, array: Array) -> int:
        return int(array.numel())

    def span(self, array: Array) -> tuple[int, int]:
        start = int(array.data_ptr())
        return start, start + int(array.nbytes)

    def bounds(self, array: Array) -> tuple[int, int]:
        if array.is_contiguous():
            return self.span(array)
        return _bounds(int(array.data_ptr()), array.shape, self.strides(array), int(array.element_size()))

    def strides(self, array: Array) -> tuple[int, ...]:
        item = int(array.element_size())
        return tuple(step * item for step in array.stride())

    def contiguous(self, array: Array) -> Array:
        import torch

        if type(array) is torch.Tensor and array.is_contiguous() and not array.is_neg():
            return array  # as it nearly always is: the views below take longer than to merge a small tensor
        return array.detach().as_subclass(torch.Tensor).resolve_neg().contiguous()

    def empty(self, like: Array, dtype: DType) -> Array:
        import torch

        return torch.empty(like.shape, dtype=getattr(torch, dtype.torch_name), device=like.device)

    def equal(self, a: Array, b: Array) -> bool:
        import torch

        if torch.equal(a, b):
            return True
        # NaN are equal to none, not even to themselves.
        return bool(a.shape == b.shape and torch.equal(_bytes_of(a), _bytes_of(b)))

    def copy(self, source: Array, to: Array) -> None:
        import torch

        with torch.inference_mode():  # what was made in that mode can be written in no other
            self.as_torch(to).copy_(source)

    def clone(self, array: Array) -> Array:
        return array.detach().clone()

    def as_torch(self, array: Array) -> Array:
        import torch

        return array.detach().as_subclass(torch.Tensor)


def _bytes_of(array: Array) -> Array:
    import torch

    return array.detach().contiguous().reshape(-1).view(torch.uint8)


def _lies_in_memory(array: Array) -> bool:
    """Whether a strided tensor's elements lie in its storage: not meta, fake, wrapped, freed."""
    try:
        storage = array.untyped_storage()
        if storage.device.type == "meta":
            return False
        first, last = TORCH.bounds(array)
        start = int(storage.data_ptr())
    except RuntimeError:  # a wrapper without a storage, or without strides
        return False
    return first == last or 0 < start <= first < last <= start + int(storage.nbytes())


NUMPY: ArrayKind = _Numpy()
TORCH: ArrayKind = _Torch()
