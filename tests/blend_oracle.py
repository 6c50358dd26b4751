"""The blends once more, from the papers and mergekit's documented guards, on whole vectors in Python floats.

Nothing is shared with the code: no Gram matrix, exact sums, and karcher iterates on the vectors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def times(factor: float, a: Vector) -> Vector:
    return [factor * x for x in a]


def plus(*vectors: Vector) -> Vector:
    return [math.fsum(column) for column in zip(*vectors, strict=True)]


def minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def arc(a: Vector, b: Vector, cosine: float, t: float) -> Vector:
    angle = math.acos(cosine)
    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return plus(times(first, a), times(second, b))


def line(a: Vector, b: Vector, t: float) -> Vector:
    return plus(times(1 - t, a), times(t, b))


def slerp(a: Vector, b: Vector, t: float) -> Vector:
    lengths = [norm(x) if norm(x) > 1e-8 else 1.0 for x in (a, b)]
    cosine = max(-1.0, min(1.0, dot(a, b) / lengths[0] / lengths[1]))
    return line(a, b, t) if abs(cosine) > 0.9995 else arc(a, b, cosine, t)


def nuslerp(a: Vector, b: Vector, weights: Sequence[float]) -> Vector:
    total = sum(weights)
    t = weights[1] / total if abs(total) >= 1e-6 else 0.5
    cosine = dot(a, b) / max(norm(a), 1e-7) / max(norm(b), 1e-7)
    return line(a, b, t) if 1 - cosine**2 <= 1e-13 else arc(a, b, cosine, t)


def multislerp(
    vectors: Sequence[Vector], weights: Sequence[float], normalize: bool, eps: float
) -> Vector | None:
    if len(vectors) == 1:
        return vectors[0]
    total = math.fsum(weights) if normalize else 1.0
    shares = [w / total for w in weights]
    units = [times(1 / (norm(x) + eps), x) for x in vectors]
    mean = plus(*(times(w, u) for w, u in zip(shares, units, strict=True)))
    if norm(mean) < eps or not any(mean):
        return (
            plus(*(times(w, x) for w, x in zip(shares, vectors, strict=True))) if len(vectors) == 2 else None
        )
    mean = times(1 / norm(mean), mean)
    tangents = [minus(u, times(dot(u, mean), mean)) for u in units]
    tangent = plus(*(times(w, x) for w, x in zip(shares, tangents, strict=True)))
    length = norm(tangent) + eps
    scale = math.fsum(w * norm(x) for w, x in zip(shares, vectors, strict=True))
    away = times(math.sin(length) / length if length else 1.0, tangent)
    return times(scale, plus(times(math.cos(length), mean), away))


def karcher(vectors: Sequence[Vector], max_iter: int, tol: float) -> Vector:
    norms = [norm(x) for x in vectors]
    units = [times(1 / n, x) for n, x in zip(norms, vectors, strict=True) if n > tol]
    if not units:
        return times(0.0, vectors[0])
    mean = times(1 / len(units), plus(*units))
    if norm(mean) < tol or not any(mean):
        mean = units[0]
    mean = times(1 / norm(mean), mean)
    for _ in range(max_iter):
        steps = [times(0.0, mean)]
        for unit in units:
            angle = math.acos(max(-1.0, min(1.0, dot(unit, mean))))
            if angle >= tol and angle > 0 and (angle < 1 or math.sin(angle) > 1e-7):
                away = minus(unit, times(math.cos(angle), mean))
                steps.append(times(angle / math.sin(angle) / len(units), away))
        step = plus(*steps)
        length = norm(step)
        if length < tol or length == 0:
            break
        mean = plus(times(math.cos(length), mean), times(math.sin(length) / length, step))
        mean = times(1 / norm(mean), mean)
    return times(math.fsum(norms) / len(norms), mean)


def model_stock(offsets: Sequence[Vector]) -> Vector:
    """How far from the base."""
    count = len(offsets)
    cosines = [
        max(-1.0, min(1.0, dot(a, b) / max(norm(a) * norm(b), 1e-6)))
        for i, a in enumerate(offsets)
        for b in offsets[i + 1 :]
    ]
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    return times(t / count, plus(*offsets))
