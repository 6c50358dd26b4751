"""How far the reference may lie from the f64 oracle: one table. Backends match bits, without any."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """`unit`: half the distance from 1 to the next number. `least`: half the smallest subnormal."""

    unit: float
    least: float
    reason: str


TOLERANCES = {
    torch.bfloat16: Tolerance(2.0**-8, 2.0**-134, "8 significant bits, one rounding at the end"),
    torch.float16: Tolerance(2.0**-11, 2.0**-25, "11 significant bits, one rounding at the end"),
    torch.float32: Tolerance(2.0**-24, 2.0**-150, "24 significant bits in every step"),
    torch.float64: Tolerance(2.0**-53, 2.0**-1074, "53 significant bits, in the oracle as well"),
}
# Roundings besides the K additions of each of the two sums: weight, lambda, difference, scale, product,
# quotient, product with lambda, sum with the base, and one for the second-order terms.
FIXED_STEPS = 9


def allowed_error(
    value: float, size: float, gain: float, k: int, working: torch.dtype, out: torch.dtype
) -> float:
    """The error that K experts' arithmetic in `working` and one rounding to `out` can make.

    `value`: the exact result. `size`: the base plus every term of the sum without its sign. `gain`: by how
    much errors of the sum grow.
    """
    work, last = TOLERANCES[working], TOLERANCES[out]
    steps = 2 * k + FIXED_STEPS
    computing = steps * (work.unit * size + work.least * max(gain, 1.0))
    return computing + last.unit * (abs(value) + computing) + last.least
