"""The demo's second opinion on the blends: numpy inner products, and the formulas once more in matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def blended(
    method: str, t: float, weights: Sequence[float], origin: F32 | None, inputs: Sequence[F32]
) -> F32:
    """The sum of coefficient * input, added to `origin` where there is one; the inputs relative to it."""
    wide = np.stack(inputs).astype(np.float64)
    factors = _coefficients(method, t, np.array(weights), wide @ wide.T)
    total = np.zeros_like(inputs[0])
    for factor, values in zip(factors, inputs, strict=True):
        total += values * np.float32(factor)
    return total if origin is None else origin + total


def _coefficients(method: str, t: float, weights: F64, gram: F64) -> F64:
    norms = np.sqrt(np.diag(gram))
    cosines = np.clip(gram / np.outer(norms, norms), -1, 1)
    count = len(norms)
    if method in ("slerp", "nuslerp"):
        share = t if method == "slerp" else float(weights[1] / weights.sum())
        angle = math.acos(cosines[0, 1])
        if method == "slerp" and abs(cosines[0, 1]) > 0.9995:
            return np.array([1 - share, share])
        return np.sin(np.array([1 - share, share]) * angle) / math.sin(angle)
    if method == "multislerp":
        shares = weights / weights.sum()
        parts = shares / (norms + 1e-8)
        return np.asarray(parts * (shares @ norms) / math.sqrt(parts @ gram @ parts))
    if method == "karcher":
        return np.asarray(norms.mean() * _mean(cosines) / norms)
    cosine = cosines[np.triu_indices(count, 1)].mean()  # model_stock
    return np.full(count, cosine / (1 + (count - 1) * cosine))


def _mean(cosines: F64) -> F64:
    """Karcher's mean of unit vectors, as coefficients of them."""
    count = len(cosines)
    mean = np.ones(count) / math.sqrt(cosines.sum())
    for _ in range(10):
        to_mean = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(to_mean)
        pulls = np.where(angles < 1e-5, 0, angles / np.sin(angles)) / count
        step = pulls - (pulls @ to_mean) * mean
        length = math.sqrt(max(0.0, float(step @ cosines @ step)))
        if length < 1e-5:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= math.sqrt(mean @ cosines @ mean)
    return mean
