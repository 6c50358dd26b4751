"""The golden cases of masks, scores and fuses: every setting with every kind of data, type and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blend_cases import BLEND_DATA, SHAPES, BlendCase
from cases import BF16, DTYPES, F32, F64

from pymerge.methods import METHODS
from pymerge.rule import Rule
from pymerge.ruling import rule_for

# method, experts, what else its rule is given; `options` are the method's own parameters
FUSE_SETTINGS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dare": ("dare_linear", 3, {"densities": [0.3, 1.0, 0.0]}),
    "dare plain": ("dare_ties", 5, {"densities": [0.5] * 5, "rescale": False}),
    "della": ("della", 5, {"densities": [0.5, 0.3, 0.7, 1.0, 0.0]}),
    "della narrow": ("della_linear", 2, {"densities": [0.2] * 2, "epsilons": [1e-6, 0.0], "lambda_": 0.7}),
    "della wide": ("della", 3, {"densities": [0.5] * 3, "epsilons": [0.49] * 3, "rescale": False}),
    "sce all": ("sce", 4, {}),
    "sce": ("sce", 3, {"options": {"select_topk": 0.3}}),
    "sce none": ("sce", 2, {"options": {"select_topk": 0.0}}),
    "sce many": ("sce", 17, {"options": {"select_topk": 0.77}}),
    "ram": ("ram", 4, {}),
    "ram one": ("ram", 1, {"options": {"epsilon": 0.0}}),
    "ram coarse": ("ram", 9, {"options": {"epsilon": 4e-4}}),
    "ramplus": ("ramplus_tl", 3, {"options": {"r": 0.5, "alpha": 0.9, "epsilon": 4e-4}}),
    "ramplus exact": ("ramplus_tl", 2, {"options": {"epsilon": 0.0}}),
    "nearswap": ("nearswap", 1, {"options": {"t": 3e-4}}),
    "nearswap away": ("nearswap", 1, {"options": {"t": -1.0}}),
    "arcee": ("arcee_fusion", 1, {}),
    "arcee half": ("arcee_fusion", 1, {"lambda_": 0.5}),
    "magmax": ("magmax", 5, {"lambda_": 0.6}),
    "emr": ("emr", 4, {"lambda_": -1.5}),
    "consensus": ("consensus", 6, {}),
    "consensus all": ("consensus", 3, {"options": {"claim": 0.7, "votes": 3}, "lambda_": 0.3}),
}


@dataclass(frozen=True)
class FuseCase(BlendCase):
    """One tensor (`shape`) of one setting."""

    @property
    def rule(self) -> Rule:
        method, k, given = FUSE_SETTINGS[self.setting]
        weights = [0.3 + 0.1 * (i % 7) for i in range(k)]
        return rule_for(METHODS[method], weights=weights, seed=7, has_base=True, **given)


def fuse_cases() -> list[FuseCase]:
    """Every setting with every kind of data, type and size; each of the others in turn."""
    cases = []
    for s, setting in enumerate(FUSE_SETTINGS):
        for i, data in enumerate(BLEND_DATA):
            cases.append(FuseCase(setting, (6, 43), list(DTYPES)[(s + i) % 3], data))
            cases.append(FuseCase(setting, SHAPES[(s + i) % len(SHAPES)], list(DTYPES)[(s + i) % 7], data))
            cases.append(FuseCase(setting, (37, 300), list(DTYPES)[(s + i + 1) % 7], data))
        for i, shape in enumerate(SHAPES):
            cases.append(FuseCase(setting, shape, list(DTYPES)[(s + i) % len(DTYPES)]))
        for i, dtypes in enumerate(DTYPES):
            cast = (None, BF16, F32)[(s + i) % 3]
            cases.append(FuseCase(setting, (21, 50), dtypes, cast=cast, out=(None, F64, BF16)[i % 3]))
    return list(dict.fromkeys(cases))


# Rows longer than a tile and than a block of the sums, and pieces that cut rows.
LARGE_SHAPES: tuple[tuple[int, ...], ...] = (
    (32769,),
    (65537,),
    (2, 65537),
    (3, 50_001),
    (90, 1111),
    (2, 3, 16_000),
)


def large_fuse_cases() -> list[FuseCase]:
    """Every setting at sizes of several pieces."""
    return [
        FuseCase(setting, LARGE_SHAPES[(s + i) % len(LARGE_SHAPES)], dtypes, data)
        for s, setting in enumerate(FUSE_SETTINGS)
        for i, (dtypes, data) in enumerate((("bf16", "realistic"), ("f32", "atom"), ("f64", "realistic")))
    ]
