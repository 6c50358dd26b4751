"""The coefficients of the blends, from a Gram matrix of inner products, in Python floats (f64).

`gram[i][j]` is the inner product of inputs i and j (of their task vectors where there is a base). Every
function returns one coefficient for each input: the result is their sum of coefficient * input. The compiled
core has the same functions in csrc/core/blend.h, operation for operation, with the C library's sqrt, sin,
cos and acos in both. (Another C library may give a sine another last bit; where the coefficients are rounded
to f32, this shows once in some 2^28.) A NaN in the matrix makes every coefficient NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pymerge.rule import Blend, Rule

Gram = Sequence[Sequence[float]]

# mergekit's guards. Its f32 cosine cannot tell a sine squared of 1e-14 from 0; our f64 sums err by less.
LEAST_NORM = 1e-8  # slerp: a shorter vector counts as of length 1
NEARLY_PARALLEL = 0.9995  # slerp: |cosine| above which the straight line is taken
LEAST_LENGTH = 1e-7  # nuslerp: a shorter vector counts as this long
LEAST_TOTAL = 1e-6  # nuslerp: weights whose sum is smaller count as equal
LEAST_SINE_SQUARED = 1e-14
LEAST_SQUARE = 1e-150  # karcher: what is smaller squared has no direction in f64
LEAST_SINE = 1e-7  # karcher: below it a vector lies on the line of the mean
LEAST_PRODUCT = 1e-6  # model_stock: a smaller product of norms counts as this
LEAST_DIVISOR = 1e-6


def coefficients(rule: Rule, gram: Gram) -> list[float] | None:
    """One for each input; None where the directions cancel and no result is better than another."""
    blend = rule.blend
    assert blend is not None
    if blend.kind is Blend.SLERP:
        return slerp(gram, blend.t)
    if blend.kind is Blend.NUSLERP:
        return nuslerp(gram, rule.weights)
    if blend.kind is Blend.MULTISLERP:
        return multislerp(gram, rule.weights, rule.normalize, blend.eps)
    if blend.kind is Blend.KARCHER:
        return karcher(gram, blend.max_iter, blend.tol)
    return model_stock(gram)


def slerp(gram: Gram, t: float) -> list[float]:
    """Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), from input 0 to input 1."""
    least = LEAST_NORM * LEAST_NORM
    square0 = 1.0 if gram[0][0] <= least else gram[0][0]
    square1 = 1.0 if gram[1][1] <= least else gram[1][1]
    cosine = clamp(gram[0][1] / mean_square(square0, square1))
    if abs(cosine) > NEARLY_PARALLEL:
        return [1 - t, t]
    return along_arc(cosine, t)


def nuslerp(gram: Gram, weights: Sequence[float]) -> list[float]:
    """As slerp, the place on the arc given by two weights (mergekit's NuSLERP)."""
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < LEAST_TOTAL else weights[1] / total
    least = LEAST_LENGTH * LEAST_LENGTH
    square0 = least if gram[0][0] < least else gram[0][0]
    square1 = least if gram[1][1] < least else gram[1][1]
    cosine = clamp(gram[0][1] / mean_square(square0, square1))
    if 1 - cosine * cosine <= LEAST_SINE_SQUARED:
        return [1 - t, t]
    return along_arc(cosine, t)


def along_arc(cosine: float, t: float) -> list[float]:
    """The point at share `t` of the arc between two directions."""
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return [math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine]


def multislerp(gram: Gram, weights: Sequence[float], normalize: bool, eps: float) -> list[float] | None:
    """The weighted mean of the directions at the weighted mean of the lengths (mergekit's multi-SLERP).

    mergekit goes on along the mean of the directions' tangents at that point, which is zero: of this step
    only the factor cos(eps) is left.
    """
    count = len(gram)
    if count == 1:
        return [1.0]
    shares = list(weights)
    if normalize:
        total = 0.0
        for weight in weights:
            total += weight
        shares = [weight / total for weight in weights]
    parts, scale = [], 0.0
    for i in range(count):
        norm = math.sqrt(gram[i][i])
        parts.append(0.0 if norm + eps == 0 else shares[i] / (norm + eps))
        scale += shares[i] * norm
    length = norm_of(gram, parts)
    if length < eps or length == 0:
        return shares if count == 2 else None
    factor = math.cos(eps) * scale / length
    return [part * factor for part in parts]


def karcher(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """The Riemannian mean of the directions (Karcher, 1977), at the mean of the lengths.

    Every iterate is a combination of the inputs, so the iteration runs on the coefficients alone.
    """
    count = len(gram)
    norms = [math.sqrt(gram[i][i]) for i in range(count)]
    scale = 0.0
    for norm in norms:
        scale += norm
    scale /= count
    dead = [norms[i] <= tol or gram[i][i] < LEAST_SQUARE for i in range(count)]
    live = [i for i in range(count) if not dead[i]]
    if not live:
        return [0.0] * count
    unit = [[gram[i][j] / mean_square(gram[i][i], gram[j][j]) for j in live] for i in live]
    mean = karcher_mean(unit, max_iter, tol)
    result = [0.0] * count
    for place, i in enumerate(live):
        result[i] = scale * mean[place] / norms[i]
    return result


def karcher_mean(unit: Gram, max_iter: int, tol: float) -> list[float]:
    """The mean of unit vectors with the Gram matrix `unit`, as coefficients of them."""
    count = len(unit)
    share = 1.0 / count
    mean = [share] * count
    length = norm_of(unit, mean)
    if length < tol or length == 0:
        return [1.0] + [0.0] * (count - 1)
    mean = [part / length for part in mean]
    for _ in range(max_iter):
        step, along = [], 0.0
        for i in range(count):
            cosine = 0.0
            for j in range(count):
                cosine += mean[j] * unit[i][j]
            cosine = clamp(cosine)
            angle = math.acos(cosine)
            sine = math.sin(angle)
            pull = 0.0
            if not angle < tol:
                pull = (1.0 if cosine > 0 else 0.0) if sine < LEAST_SINE else angle / sine
            step.append(share * pull)
            along += share * pull * cosine
        step = [step[i] - along * mean[i] for i in range(count)]
        length = norm_of(unit, step)
        if length < tol or length == 0:
            break
        stay, go = math.cos(length), math.sin(length) / length
        mean = [stay * mean[i] + go * step[i] for i in range(count)]
        length = norm_of(unit, mean)
        mean = [part / length for part in mean]
    return mean


def model_stock(gram: Gram) -> list[float]:
    """Jang et al., "Model Stock" (2024), equation 3: how far to go from the base to the experts' mean."""
    count = len(gram)
    total, pairs = 0.0, 0
    for i in range(count):
        for j in range(i + 1, count):
            product = mean_square(gram[i][i], gram[j][j])
            total += clamp(gram[i][j] / (LEAST_PRODUCT if product < LEAST_PRODUCT else product))
            pairs += 1
    cosine = total / pairs
    divisor = 1 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < LEAST_DIVISOR else count * cosine / divisor
    return [t / count] * count


def norm_of(gram: Gram, parts: Sequence[float]) -> float:
    """The length of a combination of the inputs."""
    square = 0.0
    for i in range(len(parts)):
        row = 0.0
        for j in range(len(parts)):
            row += parts[j] * gram[i][j]
        square += parts[i] * row
    return math.sqrt(0.0 if square < 0 else square)


def mean_square(a: float, b: float) -> float:
    """The geometric mean of two squared norms: exact for equal ones, in range wherever they are."""
    product = a * b
    return math.sqrt(product) if 1e-290 < product < 1e290 else math.sqrt(a) * math.sqrt(b)


def clamp(cosine: float) -> float:
    """Rounding may lead a cosine past 1; NaN stays."""
    return 1.0 if cosine > 1 else -1.0 if cosine < -1 else cosine
