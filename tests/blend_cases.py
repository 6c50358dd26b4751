"""The golden cases of the blends: every kind, type, size, layout and sort of data that decides a branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from cases import BF16, DATA, DTYPES, F32, F64, Group, Inputs, normal
from torch import Tensor

from pymerge.backends import reference
from pymerge.methods import METHODS
from pymerge.rule import Rule
from pymerge.ruling import rule_for

# method, base given, experts (the base among them for slerp), options
SETTINGS: dict[str, tuple[str, bool, int, dict[str, object]]] = {
    "slerp": ("slerp", False, 2, {"t": 0.3}),
    "slerp beyond": ("slerp", False, 2, {"t": 1.75}),
    "nuslerp": ("nuslerp", False, 2, {}),
    "nuslerp base": ("nuslerp", True, 2, {}),
    "nuslerp rows": ("nuslerp", True, 2, {"nuslerp_flatten": False}),
    "nuslerp columns": ("nuslerp", True, 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "nuslerp bare columns": ("nuslerp", False, 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp 1": ("multislerp", True, 1, {}),
    "multislerp 2": ("multislerp", False, 2, {"eps": 0.1}),
    "multislerp 5": ("multislerp", True, 5, {"normalize_weights": False}),
    "karcher 1": ("karcher", False, 1, {}),
    "karcher 4": ("karcher", False, 4, {}),
    "karcher 9": ("karcher", False, 9, {"max_iter": 3, "tol": 0.0}),
    "model_stock 2": ("model_stock", True, 2, {}),
    "model_stock 6": ("model_stock", True, 6, {}),
    "model_stock rows": ("model_stock", True, 3, {"filter_wise": True}),
    "passthrough": ("passthrough", False, 1, {}),
    "passthrough scale": ("passthrough", False, 1, {"scale": -0.3}),
}
MANY = {"multislerp": 17, "karcher": 33, "model_stock": 64}


def identical(n: int, k: int, g: torch.Generator) -> Inputs:
    x = normal(n, g)
    return torch.zeros(n, dtype=F64), [x.clone() for _ in range(k)]


def opposite(n: int, k: int, g: torch.Generator) -> Inputs:
    """Two of each three inputs point exactly away from each other, with lengths that are no powers of two."""
    x, y = normal(n, g), normal(n, g)
    return torch.zeros(n, dtype=F64), [(x, -3 * x, y)[i % 3] for i in range(k)]


def nearly_parallel(n: int, k: int, g: torch.Generator) -> Inputs:
    """On both sides of slerp's cosine of 0.9995, and far closer than that."""
    x = normal(n, g)
    return 0.01 * x, [x + (0.02, 0.035, 1e-4, 1e-7)[i % 4] * i * normal(n, g) for i in range(k)]


def some_zero(n: int, k: int, g: torch.Generator) -> Inputs:
    base = normal(n, g)
    return base, [base + normal(n, g) if i % 2 else base.clone() for i in range(k)]


def minute(n: int, k: int, g: torch.Generator) -> Inputs:
    """Norms about every guard: 1e-8, 1e-7 and products of 1e-6."""
    base = torch.zeros(n, dtype=F64)
    return base, [normal(n, g) * 10.0 ** -(3 + i % 6) / max(1, n) ** 0.5 for i in range(k)]


BLEND_DATA: dict[str, Callable[[int, int, torch.Generator], Inputs]] = DATA | {
    "identical": identical,
    "opposite": opposite,
    "nearly_parallel": nearly_parallel,
    "some_zero": some_zero,
    "minute": minute,
}


@dataclass(frozen=True)
class BlendCase:
    """One tensor (`shape`) of one setting."""

    setting: str
    shape: tuple[int, ...]
    dtypes: str = "f32"
    data: str = "realistic"
    cast: torch.dtype | None = None
    out: torch.dtype | None = None
    k: int | None = None

    @property
    def id(self) -> str:
        cast, out = (str(d).removeprefix("torch.") if d else "-" for d in (self.cast, self.out))
        shape = "x".join(map(str, self.shape))
        return f"{self.setting}-{shape}-{self.dtypes}-{self.data}-{cast}-{out}-k{self.k or 0}".replace(
            " ", "_"
        )

    @property
    def rule(self) -> Rule:
        method, has_base, k, options = SETTINGS[self.setting]
        weights = [0.3 + 0.1 * (i % 7) for i in range(self.k or k)]
        return rule_for(METHODS[method], weights=weights, options=options, has_base=has_base)

    def build(self) -> Group:
        """The tensors of this case: the same bits every time."""
        rule, n = self.rule, math.prod(self.shape)
        base_dtype, expert_dtypes = DTYPES[self.dtypes]
        k = len(rule.weights)
        base, xs = BLEND_DATA[self.data](n, k, torch.Generator().manual_seed(1000 * n + k))
        experts = [x.to(expert_dtypes[i % len(expert_dtypes)]).reshape(self.shape) for i, x in enumerate(xs)]
        bases = [base.to(base_dtype).reshape(self.shape)] if rule.task_vector else None
        stored = {x.dtype for x in experts} | ({base_dtype} if bases else set())
        common = stored.pop() if len(stored) == 1 else F64 if F64 in stored else F32
        return Group(["x"], bases, [experts], rule, [self.out or self.cast or common], self.cast)


@lru_cache(maxsize=4)
def expected(case: BlendCase) -> tuple[Group, list[Tensor] | None]:
    """A case's inputs and what the reference makes of them; None where there is no result."""
    from pymerge.errors import CheckpointError

    group = case.build()
    try:
        return group, reference.merge_group(
            group.names, group.bases, group.experts, group.rule, group.out_dtypes, group.cast
        )
    except CheckpointError:
        return group, None


# Lane edges; rows that are shorter and longer than the lanes; nothing, and no axis at all.
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0, 4),
    (1,),
    (15,),
    (16, 1),
    (17,),
    (31,),
    (33,),
    (9, 31),
    (5, 3, 17),
)
# Around what is read once, a default tile, and a block of the sums.
LARGE: tuple[tuple[int, ...], ...] = ((32767,), (32769,), (65535,), (65537,), (2, 65537), (3, 50_001))


def blend_cases() -> list[BlendCase]:
    """Every setting with every kind of data, type and size; each of the others in turn."""
    cases = []
    for s, setting in enumerate(SETTINGS):
        for i, data in enumerate(BLEND_DATA):
            cases.append(BlendCase(setting, (6, 43), list(DTYPES)[(s + i) % 3], data))
            cases.append(BlendCase(setting, SHAPES[(s + i) % len(SHAPES)], list(DTYPES)[(s + i) % 7], data))
        for i, shape in enumerate(SHAPES):
            cases.append(BlendCase(setting, shape, list(DTYPES)[(s + i) % len(DTYPES)]))
        for i, dtypes in enumerate(DTYPES):
            cast = (None, BF16, F32)[(s + i) % 3]
            cases.append(BlendCase(setting, (21, 50), dtypes, cast=cast, out=(None, F64, BF16)[i % 3]))
    return list(dict.fromkeys(cases))


def large_cases() -> list[BlendCase]:
    """Sizes past one reading, and many experts."""
    cases = [
        BlendCase(setting, LARGE[(s + i) % len(LARGE)], dtypes)
        for s, setting in enumerate(SETTINGS)
        for i, dtypes in enumerate(("bf16", "f32", "f64"))
    ]
    cases += [BlendCase(f"{m} {n}", (7, 300), k=MANY[m]) for m, n in (("multislerp", 5), ("karcher", 4))]
    cases += [
        BlendCase("model_stock 6", (5, 200), k=MANY["model_stock"]),
        BlendCase("karcher 4", (33_000,), k=8),
    ]
    cases += [BlendCase("nuslerp columns", (65_540, 2)), BlendCase("nuslerp columns", (30, 1025), "f16+f64")]
    return cases
