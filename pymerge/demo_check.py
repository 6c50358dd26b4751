"""The demo's second opinion: every method once more, plainly, with numpy and a full sort.

Nothing here is shared with the engine: thresholds come from sorting all magnitudes, random masks from
a generator written out below. Source of the generator: Salmon, Moraes, Dror, Shaw, SC 2011.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pymerge.demo_blend import blended
from pymerge.demo_family import Bits, from_bf16, round_to_bf16
from pymerge.demo_fuse import Stack, fused, ranked_limits

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

BLOCK = 65_536  # elements whose f64 sum is formed in 16 lanes before it joins the total
LANES = 16
TINY = 1e-7
FUSED = ("sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "magmax", "emr", "consensus")
GAMMA = 0.01  # the default share of outliers


@dataclass(frozen=True, slots=True)
class Expectation:
    """The parameters of one demo merge, as the recipe gives them; 1 is what is not given."""

    method: str
    weights: Sequence[float]
    density: float = 1.0
    lambda_: float = 1.0
    seed: int = 0
    t: float = 1.0

    @property
    def has_base(self) -> bool:
        """Whether the recipe names a base."""
        return self.method not in ("linear", "karcher", "passthrough")


def expected(what: Expectation, name: str, base: Bits, experts: Sequence[Bits], row: int) -> Bits:
    """The merged tensor, flat bf16 bits, from the flat bf16 bits of base and experts, in rows of `row`."""
    if what.method == "passthrough":
        return experts[0]
    if what.method in ("slerp", "karcher"):
        inputs = [from_bf16(x) for x in ([base, *experts] if what.method == "slerp" else experts)]
        return round_to_bf16(blended(what.method, what.t, what.weights, None, inputs))
    weights = [np.float32(weight) for weight in what.weights]
    if what.method == "linear":
        return round_to_bf16(
            _sum([from_bf16(x) * w for x, w in zip(experts, weights, strict=True)])
            / sum(weights, np.float32(0))
        )
    origin = from_bf16(base)
    deltas = [from_bf16(x) - origin for x in experts]
    if what.method in ("nuslerp", "multislerp", "model_stock"):
        return round_to_bf16(blended(what.method, what.t, what.weights, origin, deltas))
    if what.method in FUSED:
        stack = Stack(origin, [from_bf16(x) for x in experts], deltas, row)
        return round_to_bf16(fused(what.method, what.t, what.weights, what.lambda_, stack))
    values = []
    for k, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        values.append(_trimmed(what, name, k, delta, row) * weight)
    if what.method.endswith("ties") or what.method == "della":
        merged = _elected(values, weights, divide=what.method in ("ties", "della"))
    else:
        merged = _sum(values)
    return round_to_bf16(origin + np.float32(what.lambda_) * merged)


def _sum(values: Sequence[F32]) -> F32:
    total = np.zeros_like(values[0])
    for value in values:
        total += value
    return total


def _elected(values: Sequence[F32], weights: Sequence[np.float32], *, divide: bool) -> F32:
    """Sum, or mean by weight, of the values that have the sign of their sum."""
    positive = _sum(values) >= 0
    total = np.zeros_like(values[0])
    divisor = np.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        agrees = np.where(positive, value > 0, value < 0)
        total += np.where(agrees, value, np.float32(0))
        divisor += np.where(agrees, weight, np.float32(0))
    divisor[divisor == 0] = 1
    return total / divisor if divide else total


def _trimmed(what: Expectation, name: str, k: int, delta: F32, row: int) -> F32:
    if what.method == "task_arithmetic" or what.density >= 1:
        return delta
    if what.method == "ties":
        kept = max(1, int(what.density * delta.size))
        return np.where(_largest(np.abs(delta), kept), delta, np.float32(0))
    if what.method.startswith("breadcrumbs"):
        kept = int(what.density * delta.size)
        outliers = min(int(GAMMA * delta.size), delta.size - kept)
        between = _largest(np.abs(delta), outliers + kept) & ~_largest(np.abs(delta), outliers)
        return np.where(between, delta, np.float32(0))
    limits: object = np.uint64(int(what.density * 2**32))
    if what.method.startswith("della"):
        limits = ranked_limits(delta, row, what.density)
    mask = _words(what.seed, name, k, delta.size) < limits
    left = np.where(mask, delta, np.float32(0))
    before, after = _lane_sum(np.abs(delta)), _lane_sum(np.abs(left))
    scale = 1.0 if before < TINY or after < TINY else before / after
    return left * np.float32(scale)


def _largest(magnitudes: F32, kept: int) -> Mask:
    """The `kept` largest; among equals the first."""
    if kept == 0:
        return np.zeros_like(magnitudes, dtype=np.bool_)
    threshold = np.sort(magnitudes)[-kept]
    mask: Mask = magnitudes > threshold
    equal = np.flatnonzero(magnitudes == threshold)
    mask[equal[: kept - np.count_nonzero(mask)]] = True
    return mask


def _lane_sum(magnitudes: F32) -> float:
    """The sum in f64, in the engine's documented order: 16 lanes in each block, then lanes, then blocks."""
    total = 0.0
    for start in range(0, magnitudes.size, BLOCK):
        block = magnitudes[start : start + BLOCK]
        rows = np.zeros((-(-block.size // LANES), LANES))
        rows.reshape(-1)[: block.size] = block
        # A running sum adds strictly in order; plain sum() may pair up.
        lanes = np.add.accumulate(rows, axis=0, out=rows)[-1]
        total += float(np.add.accumulate(lanes)[-1])
    return total


def _words(seed: int, name: str, expert: int, count: int) -> NDArray[Any]:
    """One 32-bit Philox4x32-10 word for each element, as uint64."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    key = [np.uint64(int.from_bytes(part, "little")) for part in (digest[:4], digest[4:])]
    index = np.arange(-(-count // 4), dtype=np.uint64)
    word = [index & low, index >> half, np.full_like(index, expert), np.zeros_like(index)]
    for _ in range(10):
        left, right = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        word = [
            (right >> half) ^ word[1] ^ key[0],
            right & low,
            (left >> half) ^ word[3] ^ key[1],
            left & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(word, axis=1).reshape(-1)[:count]
