"""Every method is measured: the recipes of the benchmark are whole and plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import write_checkpoint

import pymerge
from bench.recipes import SETUPS, write_recipe
from pymerge.methods import METHODS


def test_every_method_has_a_recipe() -> None:
    assert SETUPS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", SETUPS)
def test_the_recipes_plan(method: str, tmp_path: Path) -> None:
    family = [write_checkpoint(tmp_path / f"model{k}", k) for k in range(4)]
    models = SETUPS[method].models(family)
    plan = pymerge.plan(write_recipe(tmp_path / "recipe.yml", method, models, 0.3))
    assert plan.method.name == method
    assert plan.experts <= len(models)
