"""The golden cases: small merges that between them meet every size, type, kind of data and option.

`golden_cases` covers every pair of axis values at least once with a seeded greedy choice, so the list is
short and the same on every machine; `Case.build` makes the tensors. Backends are compared with the reference
on all of them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pymerge.backends import reference
from pymerge.rule import Rule, Scope, ThresholdTies, Trim

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# name -> task_vector, trim, elect, normalize by default, rescale by default
METHODS = {
    "linear": (False, Trim.NONE, False, True, False),
    "task_arithmetic": (True, Trim.NONE, False, False, False),
    "ties": (True, Trim.MAGNITUDE, True, True, False),
    "dare_linear": (True, Trim.RANDOM, False, False, True),
    "dare_ties": (True, Trim.RANDOM, True, False, True),
    "breadcrumbs": (True, Trim.OUTLIERS, False, False, False),
    "breadcrumbs_ties": (True, Trim.OUTLIERS, True, False, False),
}
GAMMAS = (0.01, 0.0, 0.3)
# Tile and lane edges of every backend, the reduction block (65,536), and one size past the tiny-tensor route.
SIZES = (
    0,
    1,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    1023,
    1025,
    4095,
    4097,
    32767,
    32769,
    65537,
    100_003,
    131_073,
)
LARGE = 300_001
EXPERTS = (1, 2, 3, 5, 8, 9, 16, 17, 33, 64)
MAX_ELEMENTS = 450_000  # size * experts: bounds the time of the reference's sorts
# dtype of the base, dtypes that the experts take in turn
DTYPES = {
    "bf16": (BF16, (BF16,)),
    "f16": (F16, (F16,)),
    "f32": (F32, (F32,)),
    "f64": (F64, (F64,)),
    "bf16+f32": (BF16, (F32, BF16)),
    "f32+f16+bf16": (F32, (F16, BF16)),
    "f16+f64": (F16, (F64, BF16, F32)),
}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DENSITIES = (0.0, 1e-9, 0.1, 0.2, 0.5, 0.9, 1.0)
LAMBDAS = (1.0, 0.7, -1.5)


def bits(x: Tensor) -> Tensor:
    """The elements as integers, so that NaNs, and zeros of either sign, compare exactly."""
    return x.contiguous().view(BITS[x.dtype.itemsize])


# -- data ---------------------------------------------------------------------------------------------------
# Each kind makes (base, experts) in f64; rounding to the stored types comes after.

Inputs = tuple[Tensor, list[Tensor]]
Maker = Callable[[int, int, torch.Generator], Inputs]


def normal(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, generator=g, dtype=F64)


def integers(low: int, high: int, n: int, g: torch.Generator) -> Tensor:
    return torch.randint(low, high, (n,), generator=g).to(F64)


def signs(n: int, g: torch.Generator) -> Tensor:
    return integers(0, 2, n, g) * 2 - 1


def chance(p: float, n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, generator=g) < p


def realistic(n: int, k: int, g: torch.Generator) -> Inputs:
    """Heavy-tailed updates (Student's t, 3 degrees of freedom), a third of the entries untouched."""
    base = 0.02 * normal(n, g)
    experts = []
    for _ in range(k):
        spread = torch.stack([normal(n, g) for _ in range(3)]).square().mean(0).sqrt()
        update = 5e-4 * normal(n, g) / spread.clamp(min=1e-3)
        experts.append(base + torch.where(chance(1 / 3, n, g), 0.0, update))
    return base, experts


def all_zero(n: int, k: int, g: torch.Generator) -> Inputs:
    base = integers(-64, 65, n, g) / 64
    return base, [base.clone() for _ in range(k)]


def all_equal(n: int, k: int, g: torch.Generator) -> Inputs:
    base = integers(-4, 5, n, g)
    return base, [base + 0.25 * signs(n, g) for _ in range(k)]


def atom(n: int, k: int, g: torch.Generator) -> Inputs:
    """Half of each task vector has one magnitude, with larger and smaller ones around it."""
    experts = []
    for _ in range(k):
        u = torch.rand(n, generator=g)
        size = torch.where(
            u < 0.1, 2 + normal(n, g).abs(), torch.where(u < 0.6, 1.0, 0.5 * torch.rand(n, generator=g))
        )
        experts.append(size * signs(n, g))
    return torch.zeros(n, dtype=F64), experts


def two_values(n: int, k: int, g: torch.Generator) -> Inputs:
    base = integers(0, 2, n, g)
    return base, [base + torch.where(chance(0.3, n, g), 0.5, 0.25) * signs(n, g) for _ in range(k)]


def cancelling(n: int, k: int, g: torch.Generator) -> Inputs:
    """Experts in pairs of opposite task vectors: the sum of the kept values is zero again and again."""
    base = integers(-8, 9, n, g) / 8
    experts: list[Tensor] = []
    for i in range(k):
        experts.append(2 * base - experts[-1] if i % 2 else base + integers(-3, 4, n, g) / 16)
    return base, experts


def with_nan(n: int, k: int, g: torch.Generator) -> Inputs:
    base, experts = realistic(n, k, g)
    base[chance(0.01, n, g)] = math.nan
    for x in experts:
        x[chance(0.02, n, g)] = math.nan
        x[chance(0.02, n, g)] = -math.nan
    return base, experts


def with_inf(n: int, k: int, g: torch.Generator) -> Inputs:
    base, experts = realistic(n, k, g)
    base[chance(0.01, n, g)] = -math.inf
    for x in experts:
        x[chance(0.02, n, g)] = math.inf
        x[chance(0.02, n, g)] = -math.inf
    return base, experts


def signed_zeros(n: int, k: int, g: torch.Generator) -> Inputs:
    base = signs(n, g) * 0.0
    return base, [torch.where(chance(0.2, n, g), 1.0, 0.0) * signs(n, g) for _ in range(k)]


def denormals(n: int, k: int, g: torch.Generator) -> Inputs:
    """A few units in the last place of every type's subnormal range."""
    unit = 2.0 ** torch.tensor([-24.0, -133.0, -149.0, -1074.0], dtype=F64)[integers(0, 4, n, g).long()]
    return integers(-3, 4, n, g) * unit, [integers(-9, 10, n, g) * unit for _ in range(k)]


def huge(n: int, k: int, g: torch.Generator) -> Inputs:
    """Near the largest f16 and f32 values: differences, sums and results overflow here and there."""
    top = torch.where(chance(0.5, n, g), 65504.0, 3.3e38)
    return top * (2 * torch.rand(n, generator=g, dtype=F64) - 1), [
        top * (2 * torch.rand(n, generator=g, dtype=F64) - 1) for _ in range(k)
    ]


DATA: dict[str, Maker] = {
    "realistic": realistic,
    "zero": all_zero,
    "equal": all_equal,
    "atom": atom,
    "two_values": two_values,
    "cancelling": cancelling,
    "nan": with_nan,
    "inf": with_inf,
    "signed_zeros": signed_zeros,
    "denormals": denormals,
    "huge": huge,
}
WEIGHTS: dict[str, Callable[[int], list[float]]] = {
    "unit": lambda k: [1.0] * k,
    "half": lambda k: [0.5] * k,
    "mixed": lambda k: [0.3 + 0.1 * (i % 7) for i in range(k)],
    "negative": lambda k: [1.25 if i % 2 == 0 else -0.4 for i in range(k)],
    "some_zero": lambda k: [float(i % 3 == 0) for i in range(k)],
    "zero": lambda k: [0.0] * k,
    "late": lambda k: [1.0] * k,
    "voting_and_late": lambda k: [1.0 if i % 2 == 0 else -0.75 for i in range(k)],
}
# Late weights that go with these, where a method elects.
LATE_WEIGHTS: dict[str, Callable[[int], list[float]]] = {
    "late": lambda k: [0.3 + 0.1 * (i % 7) for i in range(k)],
    "voting_and_late": lambda k: [(-1.3, 0.0, 2.0)[i % 3] for i in range(k)],
}


# -- cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What a backend is given: the arguments of reference.merge_group."""

    names: list[str]
    bases: list[Tensor] | None
    experts: list[list[Tensor]]
    rule: Rule
    out_dtypes: list[torch.dtype]
    cast: torch.dtype | None


@dataclass(frozen=True)
class Case:
    """One golden case, as the values of its axes."""

    method: str
    size: int
    k: int
    dtypes: str
    data: str
    density: float | str
    weights: str
    lambda_: float
    scope: Scope
    ties: ThresholdTies
    normalize: bool
    rescale: bool
    cast: torch.dtype | None
    out: torch.dtype | None
    seed: int = 0

    @property
    def id(self) -> str:
        flags = "".join(c for c, on in zip("nr", (self.normalize, self.rescale), strict=True) if on)
        cast, out = (str(d).removeprefix("torch.") if d else "-" for d in (self.cast, self.out))
        return (
            f"{self.method}-n{self.size}-k{self.k}-{self.dtypes}-{self.data}-d{self.density}-{self.weights}"
            f"-l{self.lambda_}-{self.scope.value}-{self.ties.value}-{flags}-{cast}-{out}"
        )

    @property
    def rule(self) -> Rule:
        task_vector, trim, does_elect, _, _ = METHODS[self.method]
        late = LATE_WEIGHTS.get(self.weights)
        densities = (
            [0.1 + 0.8 * i / self.k for i in range(self.k)] if self.density == "each" else [self.density]
        )
        return Rule(
            task_vector=task_vector,
            trim=trim,
            elect=does_elect,
            normalize=self.normalize,
            rescale=self.rescale,
            weights=tuple(WEIGHTS[self.weights](self.k)),
            densities=tuple(float(d) for d in densities) * (self.k // len(densities)),
            lambda_=self.lambda_,
            threshold_ties=self.ties,
            scope=self.scope,
            seed=self.seed,
            gammas=tuple(GAMMAS[(self.seed + i) % 3] for i in range(self.k)) if trim is Trim.OUTLIERS else (),
            late_weights=tuple(late(self.k)) if late and does_elect else (),
        )

    @property
    def sizes(self) -> list[int]:
        """A group of several tensors, the large one in the middle, wherever the scope makes it matter."""
        return [self.size] if self.scope is Scope.TENSOR and self.size > 64 else [7, 1, self.size, 0, 33]

    def build(self) -> Group:
        """The tensors of this case: the same bits every time."""
        g = torch.Generator().manual_seed(self.seed + 1000 * self.size + self.k)
        base_dtype, expert_dtypes = DTYPES[self.dtypes]
        dtypes = [expert_dtypes[i % len(expert_dtypes)] for i in range(self.k)]
        bases, experts = [], []
        for n in self.sizes:
            base, xs = DATA[self.data](n, self.k, g)
            bases.append(base.to(base_dtype))
            experts.append([x.to(dtype) for x, dtype in zip(xs, dtypes, strict=True)])
        rule = self.rule
        stored = set(dtypes) | ({base_dtype} if rule.task_vector else set())
        out = self.out or self.cast or (stored.pop() if len(stored) == 1 else F64 if F64 in stored else F32)
        # Names whose sorted order differs from the order given: scope MODEL counts in sorted order.
        names = [f"t{(i * 7) % 5}.{i}" for i in range(len(bases))]
        return Group(names, bases if rule.task_vector else None, experts, rule, [out] * len(names), self.cast)


@lru_cache(maxsize=4)
def expected(case: Case) -> tuple[Group, list[Tensor]]:
    """A case's inputs and what the reference makes of them."""
    group = case.build()
    merged = reference.merge_group(
        group.names, group.bases, group.experts, group.rule, group.out_dtypes, group.cast
    )
    return group, merged


# -- choosing the cases -------------------------------------------------------------------------------------

AXES: dict[str, Sequence[object]] = {
    "method": ("ties", "ties", "dare_ties", "dare_linear", "task_arithmetic", "linear"),
    "size": SIZES,
    "k": EXPERTS,
    "dtypes": tuple(DTYPES),
    "data": tuple(DATA),
    "density": (*DENSITIES, "each"),
    "weights": tuple(WEIGHTS),
    "lambda_": LAMBDAS,
    "scope": tuple(Scope),
    "ties": tuple(ThresholdTies),
    "normalize": (True, False),
    "rescale": (False, True),
    "cast": (None, None, None, BF16, F16, F32, F64),
    "out": (None, None, BF16, F16, F32, F64),
}
CANDIDATES = 24


def allowed(row: dict[str, object]) -> bool:
    """Whether a choice is small enough, and one that a recipe could ask for."""
    zero_mean = row["method"] == "linear" and row["normalize"] and row["weights"] == "zero"
    return int(str(row["size"])) * int(str(row["k"])) <= MAX_ELEMENTS and not zero_mean


def golden_cases() -> list[Case]:
    """Cases that cover every allowed pair of axis values, and ties on one large tensor."""
    return covering_cases(AXES) + large_cases("ties")


def outlier_cases() -> list[Case]:
    """The same for the methods that drop outliers."""
    methods = ("breadcrumbs", "breadcrumbs_ties")
    fewer = {"size": (0, 1, 17, 4097, 65_537, 100_003), "k": (1, 2, 8, 33), "cast": (None, F32)}
    cases = covering_cases(AXES | fewer | {"method": methods})
    return cases + [case for method in methods for case in large_cases(method)]


def covering_cases(axes: dict[str, Sequence[object]]) -> list[Case]:
    """Every allowed pair of values of two axes, at least once."""
    rng = random.Random(20)
    pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if allowed({"method": "ties", "size": 1, "k": 1, "normalize": True, "weights": "unit"} | {a: x, b: y})
    }
    rows = []
    while pairs:
        a, x, b, y = min(rng.sample(sorted(pairs, key=repr), min(4, len(pairs))), key=repr)
        best: dict[str, object] = {}
        best_new: set[tuple[str, object, str, object]] = set()
        for _ in range(CANDIDATES):
            row = {axis: rng.choice(values) for axis, values in axes.items()} | {a: x, b: y}
            new = {(c, row[c], d, row[d]) for c, d in itertools.combinations(axes, 2)} & pairs
            if allowed(row) and len(new) > len(best_new):
                best, best_new = row, new
        rows.append(best)
        pairs -= best_new
    return [Case(**row, seed=i) for i, row in enumerate(rows)]  # type: ignore[arg-type]


def large_cases(method: str) -> list[Case]:
    """A trim by magnitude on a tensor large enough for the sampled bracket, in both scopes and tie rules."""
    return [
        Case(method, LARGE, 3, dtypes, data, 0.2, "unit", 1.0, scope, ties, True, False, None, None, seed=7)
        for scope, ties, (dtypes, data) in itertools.product(
            Scope, ThresholdTies, (("bf16", "realistic"), ("f32", "realistic"), ("bf16", "atom"))
        )
    ]
