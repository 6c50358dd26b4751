"""Whose meaning a method's name has: what each preset assumes where a recipe is silent, as data.

Where a preset's authors and this program differ all the same, `differs` says so, and a plan shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pymerge.errors import RecipeError
from pymerge.parameters import Preset
from pymerge.rule import Scope, ThresholdTies


@dataclass(frozen=True, slots=True)
class Defaults:
    """One method's defaults; None: the method's own (`weight`: it must be given).

    `one_more`: see `Rule`. `by_density`: what is kept is divided by the density, unless the recipe states
    `rescale`. `plain_vote`: weights neither vote nor divide a mean. `keeps_one`: of a tensor of which that
    code keeps nothing, density * n being below 1, one entry is kept here.
    """

    weight: float | None = None
    density: float | None = None
    lambda_: float = 1.0
    normalize: bool | None = None
    scope: Scope = Scope.TENSOR
    threshold_ties: ThresholdTies = ThresholdTies.FIRST
    one_more: bool = False
    by_density: bool = False
    plain_vote: bool = False
    keeps_one: bool = False
    differs: str = ""


CANCELLED = (
    "where the kept entries cancel exactly the positive ones are elected; the authors' code elects the sign"
    " that most entries of the model have"
)
# float32 holds the weights that come of it, and nobody's tensor has so many entries that one would be kept.
LARGEST_FACTOR = 1e30
MOST_FLOAT32 = 3.4028234663852886e38
# PEFT cuts among equals as torch.topk does, which is not specified.
KEEPS_ONE = "of a tensor where density * n is below 1 one entry is kept, and none by its authors' code"
_PLAIN = Defaults(weight=1.0)
_DIVIDED = Defaults(weight=1.0, by_density=True)

# TIES-Merging's own code; DARE's; the page on both says where they differ. K = 20, as the TIES paper has it.
_PAPER = {
    "linear": _PLAIN,
    "task_arithmetic": _PLAIN,
    "ties": Defaults(
        weight=1.0,
        density=0.2,
        scope=Scope.MODEL,
        threshold_ties=ThresholdTies.ALL,
        one_more=True,
        differs=CANCELLED,
    ),
    "dare_linear": _DIVIDED,
}
_FUSIONBENCH = _PAPER | {
    "ties": Defaults(
        weight=1.0,
        density=0.2,
        lambda_=0.3,
        normalize=False,
        scope=Scope.MODEL,
        threshold_ties=ThresholdTies.ALL,
        one_more=True,
        differs=CANCELLED,
    ),
}
_PEFT = {
    "task_arithmetic": Defaults(),
    "ties": Defaults(plain_vote=True, keeps_one=True),
    "dare_linear": Defaults(by_density=True),
    "dare_ties": Defaults(normalize=True, by_density=True, plain_vote=True),
}
PRESETS: Mapping[Preset, Mapping[str, Defaults]] = MappingProxyType(
    {Preset.PAPER: _PAPER, Preset.PEFT: _PEFT, Preset.FUSIONBENCH: _FUSIONBENCH}
)


def defaults_of(preset: Preset, method: str) -> Defaults:
    """What `preset` assumes of `method`; RecipeError where it cannot be followed."""
    if preset is Preset.MERGEKIT:
        return Defaults()
    rows = PRESETS[preset]
    if method in rows:
        return rows[method]
    if method == "dare_ties":
        raise RecipeError(
            f"preset {preset.value}: dare_ties trims twice there, at random and then by magnitude over the"
            " whole model, which is not supported; use preset mergekit or peft"
        )
    raise RecipeError(f"preset {preset.value} has no {method}; it has {', '.join(rows)}")


class Adjusted(NamedTuple):
    """What makes a rule do what a preset means; see `Rule`."""

    weights: tuple[float, ...]
    late_weights: tuple[float, ...]
    rescale: bool | None


def adjusted(
    defaults: Defaults, weights: Sequence[float], densities: Sequence[float], rescale: bool | None
) -> Adjusted:
    """The weights and `rescale` of a rule that does what the preset means.

    Raises RecipeError for densities that no weights follow.
    """
    divides = defaults.by_density and rescale is None
    # Where nothing is kept there is nothing to divide.
    factors = [1 / density if divides and density > 0 else 1.0 for density in densities]
    for density, factor in zip(densities, factors, strict=True):
        if factor > LARGEST_FACTOR:
            raise RecipeError(
                f"density {density!r} is too small: with this preset what is kept is divided by it, which is"
                f" supported down to {1 / LARGEST_FACTOR:g}"
            )
    scaled = tuple(weight * factor for weight, factor in zip(weights, factors, strict=True))
    for weight, density, product in zip(weights, densities, scaled, strict=True):
        if abs(weight) <= MOST_FLOAT32 < abs(product):
            raise RecipeError(
                f"weight {weight!r} divided by density {density!r}, as the preset has it, is not a finite"
                " number in float32"
            )
    rescale = False if divides else rescale
    if not defaults.plain_vote:
        return Adjusted(scaled, (), rescale)
    if len(set(factors)) > 1:
        raise RecipeError(
            "preset peft: densities that differ between experts are not supported, because there what is kept"
            " is divided by one density; give all experts one, or use preset mergekit"
        )
    late = () if all(weight == 1 for weight in scaled) else scaled
    return Adjusted((1.0,) * len(scaled), late, rescale)
