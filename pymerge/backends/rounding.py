"""Element types and bits in torch: the working type, rounding once, magnitudes as integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The integer type of the same width, and the one NaN that may leave: positive and quiet.
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
CANONICAL_NAN = {
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
SIGN_CLEARED = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}


def prepare(x: Tensor, cast: torch.dtype | None) -> Tensor:
    """An input as a flat tensor, rounded to `cast` when there is one."""
    flat = x.detach().reshape(-1)
    return flat if cast is None else round_to(flat, cast)


def in_working_type(inputs: Sequence[Tensor]) -> list[Tensor]:
    """All inputs of one tensor, widened (exactly) to f64 if one of them is f64, else to f32."""
    working = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [x.to(working) for x in inputs]


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, rounded once, to nearest even."""
    if x.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        x = round_to_odd_f32(x)  # torch goes by way of f32 and would round twice
    return x.to(dtype)


def round_to_odd_f32(x: Tensor) -> Tensor:
    """f64 to f32 so that a second rounding to 16 bits gives what one rounding would have given.

    An inexact result becomes the neighbour with an odd last bit, so it never looks like a halfway case.
    """
    nearest = x.to(torch.float32)
    bits = nearest.view(torch.int32)
    back = nearest.to(torch.float64)
    move = (back != x) & ~torch.isnan(x) & (bits & 1 == 0)
    toward_x = torch.where(back.abs() < x.abs(), 1, -1).to(
        torch.int32
    )  # in magnitude: bits are sign-magnitude
    return torch.where(move, bits + toward_x, bits).view(torch.float32)


def canonical_nan(x: Tensor) -> Tensor:
    """`x` with every NaN replaced by the one positive quiet NaN of its type."""
    nan = torch.tensor(CANONICAL_NAN[x.dtype], dtype=BITS[x.dtype], device=x.device)
    return torch.where(torch.isnan(x), nan, x.view(BITS[x.dtype])).view(x.dtype)


def magnitude(d: Tensor) -> Tensor:
    """m = bits(|d|) as an integer that orders like |d|, with all NaNs equal and highest."""
    bits = d.view(BITS[d.dtype]) & SIGN_CLEARED[d.dtype]
    return bits.clamp(max=CANONICAL_NAN[d.dtype])
