"""The settings that both tools merge by: a table, one row for each method, one entry for each setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

Values = Mapping[str, object]
NOTHING: Values = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    """One recipe: `each` holds the parameters of every expert, `shared` those of all of them.

    `base`: whether the recipe has a base model. `lists_base`: whether it stands among the models too, with
    the weight 0.25. `states_output`: the recipe has an `out_dtype`. `only`: which experts there are.
    """

    each: Sequence[Values] = ({"weight": 1.0}, {"weight": 0.5}, {"weight": -0.3})
    shared: Values = field(default_factory=dict)
    base: bool = True
    lists_base: bool = False
    states_output: bool = False
    only: Sequence[int] | None = None

    def recipe(self, method: str, dtype: str) -> dict[str, object]:
        """What stands in the recipe's file; models lie beside it."""
        models = [{"model": f"expert-{k}", "parameters": dict(own)} for k, own in enumerate(self.each)]
        if self.only is not None:
            models = [models[k] for k in self.only]
        if self.lists_base:
            models.insert(1, {"model": "base", "parameters": {"weight": 0.25}})
        recipe: dict[str, object] = {"merge_method": method, "models": models, "dtype": dtype}
        if self.base:
            recipe["base_model"] = "base"
        if self.states_output:
            recipe["out_dtype"] = dtype
        if self.shared:
            recipe["parameters"] = dict(self.shared)
        return recipe

    def write(self, path: Path, method: str, dtype: str) -> None:
        """Writes the recipe; JSON is YAML."""
        path.write_text(json.dumps(self.recipe(method, dtype), indent=1))


def weights(*values: float, **same: object) -> tuple[Values, ...]:
    """One expert for each weight; `same` holds for each of them."""
    return tuple({"weight": value, **same} for value in values)


def plain(count: int) -> tuple[Values, ...]:
    """Experts without parameters of their own."""
    return (NOTHING,) * count


DENSITIES: tuple[Values, ...] = (
    {"weight": 0.6, "density": 0.2},
    {"weight": -0.3, "density": 0.57},
    {"weight": 0.4, "density": 0.9},
    {"weight": 1.0, "density": 0.35},
)

# Methods that mergekit does not have.
OURS_ALONE = ("magmax", "emr", "consensus")
SETTINGS: Mapping[str, Sequence[Setting]] = {
    "linear": (
        Setting(base=False),
        Setting(weights(0.3, 0.3, 0.4, 0.7), {"normalize": False}, base=False),
        Setting(weights(1.0, 1.0, 1.0), lists_base=True),
    ),
    "task_arithmetic": (
        Setting(),
        Setting(weights(0.3, 0.3, 0.4, -0.7), {"lambda": 0.7}),
        Setting(weights(1.0, 1.0), {"normalize": True}),
        Setting(weights(1.0, -1.0, 0.5), {"normalize": True, "lambda": -1.3}),
    ),
    "ties": (
        Setting(weights(1.0, 1.0, 1.0, 1.0, density=0.2)),
        Setting(DENSITIES, {"normalize": False, "lambda": 0.8}),
        Setting(weights(1.0, 0.5, density=0.5), {"rescale": True}),
        Setting(weights(0.7, 0.2, 0.1, density=0.0005)),
        Setting(weights(0.5, 0.5)),
        Setting(weights(1.0, density=0.3)),
    ),
    "dare_linear": (
        Setting(weights(1.0, density=0.3)),
        Setting(weights(0.7, 0.4, density=0.5), {"lambda": 0.5}),
        Setting(weights(1.0, 0.5), {"normalize": True}),
        Setting(weights(0.7, 0.4, 0.3, density=0.6), {"rescale": False}),
    ),
    "dare_ties": (
        Setting(weights(1.0, 0.6, density=0.3)),
        Setting(weights(0.7, 0.4, 0.3, density=0.8), {"normalize": True}),
        Setting(weights(1.0, 0.5, -0.3), {"lambda": 0.5}),
        Setting(weights(0.7, 0.4, 0.3, density=0.6), {"rescale": False}),
    ),
    "breadcrumbs": (
        Setting(weights(1.0, 0.5, density=0.4)),
        Setting(weights(1.0, 0.5, -0.3, density=0.3, gamma=0.1), {"lambda": 0.6, "rescale": True}),
        Setting(weights(0.5, 0.8, density=0.95, gamma=0.2), {"normalize": True}),
    ),
    "breadcrumbs_ties": (
        Setting(weights(1.0, 1.0, 1.0, density=0.6)),
        Setting(weights(1.0, 0.5, -0.3, density=0.3, gamma=0.1), {"rescale": True}),
        Setting(weights(0.5, 0.8, 0.2, 0.4, density=0.7, gamma=0.0), {"normalize": True}),
    ),
    "della": (
        Setting(weights(1.0, 0.6, density=0.4)),
        Setting(weights(0.7, 0.4, 0.3, density=0.7, epsilon=0.1), {"normalize": False}),
        Setting(weights(1.0, 0.5, -0.3), {"lambda": 0.5}),
        Setting(weights(0.7, 0.4, 0.3, density=0.6), {"rescale": False}),
    ),
    "della_linear": (
        Setting(weights(1.0, density=0.4)),
        Setting(weights(0.7, 0.4, density=0.5, epsilon=0.2), {"lambda": 0.5}),
        Setting(weights(1.0, 0.5), {"normalize": True}),
        Setting(weights(0.7, 0.4, 0.3, density=0.6), {"rescale": False}),
    ),
    "sce": (
        Setting(plain(3)),
        Setting(plain(3), {"select_topk": 0.3}),
        Setting(plain(4), {"select_topk": 0.75}),
    ),
    "ram": (
        Setting(plain(2)),
        Setting(plain(4), {"epsilon": 1e-4}),
        Setting(plain(3), {"epsilon": 0.001}),
    ),
    # mergekit's result is float32 whatever the type, unless the recipe says what is written.
    "ramplus_tl": (
        Setting(plain(3), states_output=True),
        Setting(plain(4), {"epsilon": 5e-4, "r": 0.3, "alpha": 0.5}, states_output=True),
        Setting(plain(2), {"epsilon": 1e-3, "r": 0.5, "alpha": 5.0}, states_output=True),
    ),
    "nearswap": (
        Setting(plain(1), {"t": 1e-4}),
        Setting(plain(1), {"t": 1e-3}),
        Setting(plain(1), {"t": [0.0, 0.01]}),
    ),
    # Float32 here too.
    "arcee_fusion": (
        Setting(plain(1), states_output=True),
        Setting(({}, {}), base=True, states_output=True, only=(1,)),
        Setting(({}, {}, {}), base=True, states_output=True, only=(2,)),
    ),
    "slerp": (
        Setting(plain(1), {"t": 0.3}),
        Setting(plain(1), {"t": [0, 0.5, 1]}),
        Setting(plain(1), {"t": 1.0}),
    ),
    "nuslerp": (
        Setting(weights(0.7, 0.4), base=False),
        Setting(weights(1.0, 3.0)),
        Setting(weights(1.0, 1.0), {"nuslerp_flatten": False}),
        Setting(weights(0.5, 0.2), {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ),
    "multislerp": (
        Setting(weights(1.0, 1.0, 1.0), base=False),
        Setting(weights(0.7, 0.2, 0.4, 0.3)),
        Setting(weights(0.3, 0.3, 0.2), {"normalize_weights": False}),
    ),
    "karcher": (
        Setting(plain(3), base=False),
        Setting(plain(4), {"max_iter": 3}, base=False),
        Setting(plain(2), {"tol": 1e-3}),
    ),
    "model_stock": (
        Setting(plain(2)),
        Setting(plain(4)),
        Setting(plain(3), {"filter_wise": True}),
    ),
    "passthrough": (
        Setting(plain(1), base=False),
        Setting(({"scale": 0.3},), base=False),
        Setting(({"scale": -1.5},), base=False),
    ),
}


def has_known_factors(setting: Setting) -> bool:
    """Whether no factor hangs on what was drawn: nothing is dropped, or what is kept is not rescaled."""
    return not any("density" in own for own in setting.each) or setting.shared.get("rescale") is False


# (method, number): what tests are named after and files are called.
ROWS = [(method, number) for method, settings in SETTINGS.items() for number in range(len(settings))]
