"""How each method is measured: how many experts, a base or none, and which parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Setup:
    """One method's recipe. `experts`: how many it takes at most, None for all that there are.

    `base`: the first model is its base. `trims`: every expert has a density. `shared`: the parameters of all.
    """

    experts: int | None = None
    base: bool = True
    weighted: bool = True
    trims: bool = False
    shared: Mapping[str, object] = field(default_factory=dict)

    def models(self, models: Sequence[Path]) -> tuple[Path, ...]:
        """What is read of a family: its base (always the first), and the experts that this takes."""
        return tuple(models[: None if self.experts is None else self.experts + 1])


SETUPS: Mapping[str, Setup] = MappingProxyType(
    {
        "linear": Setup(base=False),
        "task_arithmetic": Setup(),
        "ties": Setup(trims=True),
        "dare_linear": Setup(trims=True),
        "dare_ties": Setup(trims=True),
        "breadcrumbs": Setup(trims=True),
        "breadcrumbs_ties": Setup(trims=True),
        "della": Setup(trims=True),
        "della_linear": Setup(trims=True),
        "sce": Setup(weighted=False, shared={"select_topk": 0.5}),
        "ram": Setup(weighted=False),
        "ramplus_tl": Setup(weighted=False),
        "nearswap": Setup(experts=1, weighted=False, shared={"t": 1e-4}),
        "arcee_fusion": Setup(experts=1, weighted=False),
        "magmax": Setup(),
        "emr": Setup(),
        "consensus": Setup(),
        "slerp": Setup(experts=1, weighted=False, shared={"t": 0.4}),
        "nuslerp": Setup(experts=2),
        "multislerp": Setup(),
        "karcher": Setup(base=False, weighted=False),
        "model_stock": Setup(weighted=False),
        "passthrough": Setup(experts=1, base=False, weighted=False),
    }
)


# What mergekit 0.1.5 does not have.
OURS_ALONE = ("magmax", "emr", "consensus")


def write_recipe(
    path: Path,
    method: str,
    models: Sequence[Path],
    density: float,
    own: Mapping[str, object] | None = None,
) -> Path:
    """Mergekit's YAML (JSON is YAML) for a family, the base first; `own`: parameters that only we know."""
    setup = SETUPS[method]
    each = ({"weight": 1.0} if setup.weighted else {}) | ({"density": density} if setup.trims else {})
    recipe: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": each} for model in models[1:]],
        "dtype": "bfloat16",
    }
    if setup.base:
        recipe["base_model"] = str(models[0])
    if shared := {**setup.shared, **(own or {})}:
        recipe["parameters"] = shared
    path.write_text(json.dumps(recipe, indent=1))
    return path
