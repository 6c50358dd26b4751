"""Recipes of several modules: each takes the tensors below its name, with its own models and parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made import write_checkpoint

import pymerge
from pymerge.checkpoint.index import open_checkpoint
from pymerge.errors import ProblemList
from pymerge.job import TensorJob

TEXT = {f"model.language_model.layers.{layer}.mlp.weight": (8, 12) for layer in range(4)}
VISION = {f"model.vision_tower.blocks.{layer}.attn.weight": (6, 6) for layer in range(2)}
OTHER = {"model.multi_modal_projector.weight": (6, 8), "lm_head.weight": (20, 8)}
SHAPES = {**TEXT, **VISION, **OTHER}

RECIPE = """
merge_method: task_arithmetic
base_model: base
modules:
  language_model:
    models:
      - {model: one, parameters: {weight: [0, 1]}}
      - {model: two}
    parameters: {weight: 0.25}
  vision_tower:
    models: [{model: two, parameters: {weight: 2}}]
  multi_modal_projector:
    models: [{model: one}, {model: three}]
  lm_head:
    models: [{model: three}]
parameters: {weight: 0.5}
"""


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two", "three")):
        write_checkpoint(tmp_path / name, seed, shapes=SHAPES, shards=1 + seed)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yml").write_text(text)
    return folder / "recipe.yml"


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ProblemList) as caught:
        pymerge.plan(written(folder, text))
    return list(caught.value.problems)


def tensor(folder: Path, name: str) -> bytes:
    checkpoint = open_checkpoint(folder)
    ref = checkpoint.tensors[name]
    return checkpoint.shards[ref.shard].path.read_bytes()[ref.entry.begin : ref.entry.end]


def weights_of(job: TensorJob) -> tuple[float, ...]:
    assert job.rule is not None
    return job.rule.weights


def test_every_module_has_its_own_models_and_parameters(family: Path) -> None:
    plan = pymerge.plan(written(family, RECIPE))
    found = {job.name: weights_of(job) for shard in plan.jobs for job in shard}
    assert found == {
        "model.language_model.layers.0.mlp.weight": (0.0, 0.25),
        "model.language_model.layers.1.mlp.weight": (1 / 3, 0.25),
        "model.language_model.layers.2.mlp.weight": (2 / 3, 0.25),
        "model.language_model.layers.3.mlp.weight": (1.0, 0.25),
        "model.vision_tower.blocks.0.attn.weight": (2.0,),
        "model.vision_tower.blocks.1.attn.weight": (2.0,),
        "model.multi_modal_projector.weight": (0.5, 0.5),
        "lm_head.weight": (0.5,),
    }
    text = plan.describe()
    assert "module       'vision_tower'" in text
    assert f"expert       {family}/one (weight 0 .. 0.666667 .. 1)" in text
    assert plan.summary()["modules"] == ["language_model", "vision_tower", "multi_modal_projector", "lm_head"]


def test_the_bits_are_those_of_a_recipe_for_the_whole_model(family: Path) -> None:
    pymerge.merge(written(family, RECIPE), family / "out")
    for name, models in {
        "model.vision_tower.blocks.1.attn.weight": "[{model: two, parameters: {weight: 2}}]",
        "model.multi_modal_projector.weight": "[{model: one}, {model: three}]",
        "lm_head.weight": "[{model: three}]",
    }.items():
        text = (
            f"merge_method: task_arithmetic\nbase_model: base\nmodels: {models}\nparameters: {{weight: 0.5}}"
        )
        pymerge.merge(written(family, text), family / f"whole-{name}")
        assert tensor(family / "out", name) == tensor(family / f"whole-{name}", name)
        assert tensor(family / "out", name) != tensor(family / "base", name)
    assert set(open_checkpoint(family / "out").tensors) == set(SHAPES)


def test_a_base_that_is_not_listed_is_the_last_input_of_each_module(family: Path) -> None:
    text = RECIPE.replace("task_arithmetic", "linear")
    plan = pymerge.plan(written(family, text))
    vision = next(job for shard in plan.jobs for job in shard if "blocks.0" in job.name)
    files = [plan.shards[source.file].path.parent.name for source in vision.experts]  # type: ignore[union-attr]
    assert files == ["two", "base"]
    assert weights_of(vision) == (2.0, 0.5)


def test_slices_of_one_module(family: Path) -> None:
    text = """
merge_method: passthrough
modules:
  language_model:
    slices:
      - sources: [{model: one, layer_range: [0, 2]}]
      - sources: [{model: two, layer_range: [1, 4]}]
  vision_tower: {models: [{model: two}]}
  multi_modal_projector: {models: [{model: one}]}
  lm_head: {models: [{model: three}]}
"""
    plan = pymerge.plan(written(family, text))
    assert "modules.language_model: has 5 layers now; config.json is left as it is" in plan.notes
    pymerge.merge(written(family, text), family / "out")
    layer = "model.language_model.layers.{}.mlp.weight"
    for at, (model, of) in enumerate((("one", 0), ("one", 1), ("two", 1), ("two", 2), ("two", 3))):
        assert tensor(family / "out", layer.format(at)) == tensor(family / model, layer.format(of))
    assert tensor(family / "out", "lm_head.weight") == tensor(family / "three", "lm_head.weight")
    config = json.loads((family / "out" / "config.json").read_text())
    assert config == json.loads((family / "one" / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def test_optional_tensors_of_one_module(family: Path) -> None:
    for name in ("base", "one", "two", "three"):
        bias = {"model.vision_tower.post.bias": (6,)} if name != "one" else {}
        write_checkpoint(family / f"{name}-b", 7, shapes={**SHAPES, **bias})
    text = RECIPE
    for name in ("base", "one", "two", "three"):
        text = text.replace(f"model: {name}", f"model: {name}-b")
    text = text.replace("[{model: two-b, parameters: {weight: 2}}]", "[{model: two-b}, {model: one-b}]")
    plan = pymerge.plan(written(family, text))
    found = {job.name: len(job.experts) for shard in plan.jobs for job in shard}
    assert found["model.vision_tower.post.bias"] == 1
    assert found["model.vision_tower.blocks.0.attn.weight"] == 2
    assert found["model.multi_modal_projector.weight"] == 2
    assert any(
        note.startswith("modules.vision_tower: tensor 'model.vision_tower.post.bias'") for note in plan.notes
    )


def test_tensors_of_no_module_or_of_two(family: Path) -> None:
    found = problems(family, RECIPE.replace("  lm_head:\n    models: [{model: three}]\n", ""))
    assert found[0] == f"modules: 'lm_head.weight' of base {family}/base is below none, expected one module"
    two = RECIPE.replace("  lm_head:", "  model:\n    models: [{model: one}]\n  lm_head:")
    found = problems(family, two)
    assert " is below language_model and model, expected one module" in found[0]
    assert found[3] == "modules: 4 more tensors are not below one alone either"
    odd = problems(family, RECIPE.replace("  lm_head:", "  head: {models: [{model: one}]}\n  lm_head:"))
    assert odd == [f"modules.head: base {family}/base has no tensors"]


def test_problems_name_their_module(family: Path) -> None:
    found = problems(family, RECIPE.replace("{weight: 2}", "{density: 2}").replace("weight: 0.5", ""))
    assert f"modules.vision_tower: task_arithmetic needs a weight for {family}/two" in found
    found = problems(family, RECIPE.replace("{weight: 0.5}", "{weight: 0.5, scope: model}"))
    assert found == ["scope: model knows of no modules, which are merged apart; use scope: tensor"]


def test_a_missing_model_is_the_only_problem_where_weights_vary(family: Path) -> None:
    found = problems(family, RECIPE.replace("  - {model: two}", "  - {model: gone}"))
    assert len(found) == 1
    assert found[0].startswith("modules.language_model.models[1].model: no such file or folder: ")
    text = "merge_method: linear\nmodels: [{model: one}, {model: gone}]\nparameters: {weight: [0, 1]}"
    assert problems(family, text)[0].startswith("models[1].model: no such file or folder: ")
