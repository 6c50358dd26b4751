"""An independent computation of every method, element by element in Python floats (f64).

It shares no code with the reference: full sorts, exact sums, its own generator in plain integers. It does not
round to f32 on the way, so the reference agrees within tolerances.py and exactly where f32 is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pymerge.rule import Rule, Scope, ThresholdTies, Trim

Numbers = list[float]


@dataclass(frozen=True)
class Element:
    """One merged element, and what its rounding errors may be measured against.

    `size`: the base and all terms of the sum with their signs removed. `gain`: what becomes of an error of 1
    in the sum. `unsure`: the two sides weigh so nearly the same that rounding may elect either.
    """

    value: float
    size: float
    gain: float
    unsure: bool


def merge(
    names: Sequence[str],
    bases: Sequence[Numbers] | None,
    experts: Sequence[Sequence[Numbers]],
    rule: Rule,
) -> list[list[Element]]:
    """Merges a group; `experts[i][k]` is tensor i of expert k, `bases` None for linear."""
    if bases is None:
        return [[weighted(0.0, column, rule) for column in zip(*xs, strict=True)] for xs in experts]
    deltas = [
        [[x - b for x, b in zip(expert, base, strict=True)] for expert in xs]
        for xs, base in zip(experts, bases, strict=True)
    ]
    kept = keep_masks(names, deltas, rule)
    merged = []
    for base, ds, keeps in zip(bases, deltas, kept, strict=True):
        factors = [scale_of(d, keep, p, rule) for d, keep, p in zip(ds, keeps, rule.densities, strict=True)]
        elements = []
        for i, b in enumerate(base):
            column = [d[i] * f if keep[i] else None for d, f, keep in zip(ds, factors, keeps, strict=True)]
            elements.append(elected(b, column, rule) if rule.elect else weighted(b, column, rule))
        merged.append(elements)
    return merged


# -- what takes part ----------------------------------------------------------------------------------------


def keep_masks(
    names: Sequence[str], deltas: Sequence[Sequence[Numbers]], rule: Rule
) -> list[list[list[bool]]]:
    """One bool per element, shaped as `deltas`."""
    masks = [[[True] * len(d) for d in ds] for ds in deltas]
    for k, density in enumerate(rule.densities):
        if rule.trim is Trim.RANDOM:
            for i, name in enumerate(names):
                masks[i][k] = [
                    density >= 1 or random_word(rule.seed, name, j, k) < density * 2**32 - 1e-9
                    for j in range(len(deltas[i][k]))
                ]
        elif rule.trim.by_magnitude:
            everything = sorted(range(len(names)), key=lambda i: names[i].encode())
            for part in [everything] if rule.scope is Scope.MODEL else [[i] for i in everything]:
                where = [(i, j) for i in part for j in range(len(deltas[i][k]))]
                values = [deltas[i][k][j] for i, j in where]
                if rule.trim is Trim.OUTLIERS:
                    chosen = middle(values, density, rule.gammas[k], rule.threshold_ties)
                else:
                    chosen = largest(values, density, rule.threshold_ties, rule.one_more)
                for (i, j), keep in zip(where, chosen, strict=True):
                    masks[i][k][j] = keep
    return masks


def largest(values: Numbers, density: float, ties: ThresholdTies, one_more: bool = False) -> list[bool]:
    """Which values are among the int(density * n) of largest size, by a full sort."""
    n = len(values)
    fewest = 1 if n else 0
    count = n if density >= 1 else 0 if density <= 0 else max(fewest, int(density * n) + one_more)
    rank = [(1, 0.0) if math.isnan(v) else (0, abs(v)) for v in values]
    order = sorted(range(n), key=lambda i: (-rank[i][0], -rank[i][1], i))
    if ties is ThresholdTies.ALL and 0 < count <= n:
        return [r >= rank[order[count - 1]] for r in rank]
    chosen = set(order[:count])
    return [i in chosen for i in range(n)]


def middle(values: Numbers, density: float, gamma: float, ties: ThresholdTies) -> list[bool]:
    """What an ascending full sort has in [bottom, bottom + target) (mergekit 0.1.5's breadcrumbs)."""
    n = len(values)
    if density >= 1:
        return [True] * n
    target, top = int(density * n), int(gamma * n)
    bottom = max(0, n - target - top)
    rank = [(1, 0.0) if math.isnan(v) else (0, abs(v)) for v in values]
    order = sorted(range(n), key=lambda i: (rank[i], -i))
    chosen = order[bottom : bottom + target]
    if ties is ThresholdTies.FIRST or not chosen:
        return [i in set(chosen) for i in range(n)]
    dropped = order[bottom + target :]
    return [r >= rank[chosen[0]] and not (dropped and r >= rank[dropped[0]]) for r in rank]


def random_word(seed: int, name: str, index: int, expert: int) -> int:
    """The 32-bit word that decides one element of a random trim: Philox4x32-10 in plain integers."""
    digest = int.from_bytes(
        blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8).digest(), "little"
    )
    key = [digest % 2**32, digest >> 32]
    c = [(index // 4) % 2**32, (index // 4) >> 32, expert, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b % 2**32, (a >> 32) ^ c[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return c[index % 4]


def scale_of(d: Numbers, keep: list[bool], density: float, rule: Rule) -> float:
    """The factor that restores a trimmed task vector's L1 norm."""
    if not rule.rescale or rule.trim is Trim.NONE or density >= 1:
        return 1.0
    before = total(abs(v) for v in d)
    after = total(abs(v) for v, kept in zip(d, keep, strict=True) if kept)
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


def total(values: Iterable[float]) -> float:
    """An exactly rounded sum that lets infinities through."""
    listed = list(values)
    return math.fsum(listed) if all(map(math.isfinite, listed)) else sum(listed)


# -- what comes of it ---------------------------------------------------------------------------------------


def elected(base: float, column: Sequence[float | None], rule: Rule) -> Element:
    """The entries that agree with the sign of their sum, averaged or summed; None is a trimmed entry."""
    late = rule.late_weights or (1.0,) * len(column)
    terms = [(d * w, w, u) for d, w, u in zip(column, rule.weights, late, strict=True) if d is not None]
    mass = total(v for v, _, _ in terms)
    if math.isnan(mass):
        return Element(math.nan, math.inf, 1.0, False)
    side = 1 if mass >= 0 else -1
    agreeing = [(v * u, w) for v, w, u in terms if v * side > 0]
    unsure = 0 < abs(mass) < 1e-5 * total(abs(v) for v, _, _ in terms)
    return finish(base, agreeing, total(w for _, w in agreeing) or 1.0, rule.lambda_, rule.normalize, unsure)


def weighted(base: float, column: Sequence[float | None], rule: Rule) -> Element:
    """All entries, averaged by all weights or summed."""
    terms = [(d * w, w) for d, w in zip(column, rule.weights, strict=True) if d is not None]
    den = total(rule.weights)
    if rule.task_vector and abs(den) < 1e-8:
        den = 1.0
    return finish(base, terms, den, rule.lambda_ if rule.task_vector else 1.0, rule.normalize, False)


def finish(
    base: float,
    terms: Sequence[tuple[float, float]],
    den: float,
    lambda_: float,
    normalize: bool,
    unsure: bool,
) -> Element:
    """Base plus lambda times the sum of the terms, divided by `den` where asked."""
    divisor = den if normalize else 1.0
    spread = max(1.0, total(abs(w) for _, w in terms) / abs(divisor)) if normalize else 1.0
    gain = abs(lambda_ / divisor)
    size = abs(base) + gain * total(abs(v) for v, _ in terms) * spread
    return Element(base + lambda_ * (total(v for v, _ in terms) / divisor), size, gain, unsure)
