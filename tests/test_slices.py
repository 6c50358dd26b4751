"""Values by layer and by name, and outputs put together from slices: planned, merged, said in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bits
from families import Family, make_family, read_checkpoint
from torch import Tensor

import pymerge
from pymerge.backends import reference
from pymerge.checkpoint.sidefiles import states_layers, with_layers
from pymerge.errors import ProblemList
from pymerge.methods import METHODS
from pymerge.plan_layers import Layers
from pymerge.plan_memory import budget
from pymerge.plan_stack import is_first
from pymerge.planner import Plan
from pymerge.ruling import rule_for

LAYERS = 2  # of the family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), torch.bfloat16)


def recipe_of(family: Family, method: str, **top: Any) -> str:
    """JSON is YAML. Models are given as numbers of experts, or "base"."""
    text = json.dumps({"merge_method": method, **top}, indent=1)
    for number, path in enumerate(family.expert_paths):
        text = text.replace(f'"model": {number}', f'"model": "{path}"')
    return text.replace('": "base"', f'": "{family.base_path}"')


def sources(*of: int | str, layers: Sequence[int] = (0, LAYERS), **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": model, "layer_range": list(layers), "parameters": parameters} for model in of]


def planned(family: Family, method: str, **top: Any) -> Plan:
    return pymerge.plan(recipe_of(family, method, **top))


def problems(family: Family, method: str, **top: Any) -> tuple[str, ...]:
    with pytest.raises(ProblemList) as caught:
        planned(family, method, **top)
    return caught.value.problems


def merge_one(method: str, base: Tensor | None, experts: Sequence[Tensor], name: str, **rule: Any) -> Tensor:
    """What the reference makes of one tensor."""
    made = rule_for(METHODS[method], **rule)
    bases = None if base is None else [base]
    return reference.merge_group([name], bases, [experts], made, [experts[0].dtype])[0]


def assert_same(merged: Mapping[str, Tensor], name: str, wanted: Tensor) -> None:
    assert torch.equal(bits(merged[name]), bits(wanted)), name


# -- layers in names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "stacks", "depths"),
    [
        (
            [
                "model.layers.0.mlp.experts.0.up",
                "model.layers.1.mlp.experts.5.up",
                "model.layers.2.a",
                "head",
            ],
            {"model.layers": range(3)},
            [0.0, 0.5, 1.0, 0.0],
        ),
        (["transformer.h.0.a", "transformer.h.1.a", "wte"], {"transformer.h": range(2)}, [0.0, 1.0, 0.0]),
        (["0.auto.layer.0.a", "0.auto.layer.1.a"], {"0.auto.layer": range(2)}, [0.0, 1.0]),
        (["blocks.1.a", "blocks.2.a"], {"blocks": range(1, 3)}, [0.0, 1.0]),
        (["net.0.a", "net.2.a", "blocks.0.a", "blocks.1"], {"blocks": range(2)}, [0.0, 0.0, 0.0, 1.0]),
        (
            ["v.blocks.0", "v.blocks.1", "t.h.0", "t.h.1"],
            {"v.blocks": range(2), "t.h": range(2)},
            [0, 1, 0, 1],
        ),
        (["model.layers.0.a", "norm"], {"model.layers": range(1)}, [1.0, 0.0]),
        (["model.layers.00.a", "model.layers.01.a", "a"], {}, [0.0, 0.0, 0.0]),
    ],
)
def test_layers_are_read_from_names(names: list[str], stacks: object, depths: list[float]) -> None:
    layers = Layers(names)
    assert layers.stacks == stacks
    assert [layers.depth(name) for name in names] == depths


def test_what_comes_before_the_layers() -> None:
    for name in ("model.embed_tokens.weight", "transformer.wte.weight", "shared.weight", "bert.embeddings.x"):
        assert is_first(name), name
    for name in ("model.norm.weight", "lm_head.weight", "embed_out.weight", "transformer.ln_f.bias"):
        assert not is_first(name), name


# -- gradients and filters ----------------------------------------------------------------------------------


def test_every_tensor_gets_what_its_layer_and_name_say(family: Family, tmp_path: Path) -> None:
    text = recipe_of(
        family,
        "ties",
        base_model="base",
        models=[
            {"model": 0, "parameters": {"weight": [1, 0.25], "density": [{"filter": "mlp", "value": 0.3}]}},
            {"model": 1, "parameters": {"weight": {"filter": "self_attn", "value": [0.5, 0.75]}}},
        ],
        parameters={"weight": 0.6, "density": [0.5, 0.9], "lambda": [{"filter": "norm", "value": 2}]},
    )
    pymerge.merge(text, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    assert merged.keys() == family.base.keys()
    for name, base in family.base.items():
        last = ".1." in name
        wanted = merge_one(
            "ties",
            base,
            [family.experts[0][name], family.experts[1][name]],
            name,
            weights=[0.25 if last else 1.0, (0.75 if last else 0.5) if "self_attn" in name else 0.6],
            densities=[0.3 if "mlp" in name else 0.9 if last else 0.5, 0.9 if last else 0.5],
            lambda_=2.0 if "norm" in name else 1.0,
        )
        assert_same(merged, name, wanted)


def test_equal_rules_are_one_object(family: Family) -> None:
    models = [{"model": 0, "parameters": {"weight": [1, 1]}}]
    plan = planned(family, "linear", models=models)
    assert len(plan.rules) == 1
    assert {id(job.rule) for shard in plan.jobs for job in shard} == {id(plan.rules[0])}


def test_passes_and_bytes_are_those_of_each_tensor(family: Family) -> None:
    """A rescale reads twice, and only where something is trimmed."""
    given = {"weight": 1, "rescale": True}
    top: dict[str, Any] = {"base_model": "base", "models": [{"model": 0}]}
    once = planned(family, "ties", **top, parameters=given)
    some = planned(family, "ties", **top, parameters=given | {"density": [{"filter": "norm", "value": 0.5}]})
    norms = sum(2 * 2 * job.count for shard in some.jobs for job in shard if "norm" in job.name)
    assert (once.passes, some.passes) == (1, 2)
    assert some.bytes_read == once.bytes_read + norms
    assert (budget(once).lists, budget(some).lists > 0) == (0, True)


def test_scope_model_needs_one_rule(family: Family) -> None:
    top: dict[str, Any] = {"base_model": "base", "models": [{"model": 0}]}
    found = problems(family, "ties", **top, parameters={"weight": [0, 1], "density": 0.5, "scope": "model"})
    assert len(found) == 1
    assert found[0].startswith(
        "scope: model needs the same parameters for all tensors, but weights of 'model."
    )
    same = {"weight": [1, 1], "density": 0.5, "scope": "model"}
    assert planned(family, "ties", **top, parameters=same).scope.value == "model"


def test_a_number_out_of_range_is_one_sentence(family: Family) -> None:
    models = [{"model": 0, "parameters": {"weight": [{"filter": "mlp", "value": 1}], "density": [0.5, 1.5]}}]
    found = problems(family, "ties", base_model="base", models=models)
    assert len(found) == 2
    assert found[0].startswith(f"ties needs a weight for {family.expert_paths[0]} (tensor 'model.")
    assert found[1].startswith(
        f"density of {family.expert_paths[0]} is 1.5, which is outside 0 to 1 (tensor "
    )


def test_the_plan_says_what_varies(family: Family) -> None:
    weight = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    models = [{"model": 0, "parameters": {"weight": weight}}, {"model": 1, "parameters": {"weight": [1, 3]}}]
    more = {"density": {"filter": "q_proj", "value": 0.5}, "lambda": [2, 1]}
    text = planned(family, "ties", base_model="base", models=models, parameters=more).describe()
    one, two = family.expert_paths[:2]
    assert f"expert       {one} (weight ['mlp': 0 .. 1; else: 0.5], density ['q_proj': 0.5; else: 1])" in text
    assert f"expert       {two} (weight 1 .. 3, density ['q_proj': 0.5; else: 1])" in text
    assert "lambda       2 .. 1\n" in text
    assert "layers       2 in the longest stack; a .. b .. c are the values in the first, the middle" in text


def test_surprises_are_noted(family: Family) -> None:
    weight = [{"filter": "q_prj", "value": 0}, {"value": 1}, {"filter": "mlp", "value": 2}]
    notes = planned(
        family, "linear", models=[{"model": 0, "parameters": {"weight": weight, "density": [0, 1]}}]
    ).notes
    assert notes == (
        "density has no effect with linear",
        "weight: the filter 'q_prj' matches no tensor",
        "weight: what follows the case for all tensors has no effect",
    )


# -- slices -------------------------------------------------------------------------------------------------


def test_slices_renumber_layers_and_may_use_one_twice(family: Family, tmp_path: Path) -> None:
    text = recipe_of(
        family,
        "linear",
        slices=[
            {"sources": sources(0, 1, weight=[0.25, 0.75])},
            {"sources": sources(1, layers=(1, 2)), "parameters": {"normalize": False}},
            {"sources": [*sources(0, layers=(0, 2)), *sources(1, layers=(0, 2)), *sources(2, layers=(0, 2))]},
        ],
        parameters={"weight": 0.5},
    )
    pymerge.merge(text, tmp_path / "out", max_shard_size="100KB")
    merged = read_checkpoint(tmp_path / "out")
    one, two, three = family.experts
    rests = [name.removeprefix("model.layers.0.") for name in one if name.startswith("model.layers.0.")]
    assert len(merged) == 5 * len(rests) + 2
    for rest in rests:
        names = [f"model.layers.{layer}.{rest}" for layer in range(5)]
        for layer, weight in ((0, 0.25), (1, 0.75)):
            experts = [one[names[layer]], two[names[layer]]]
            assert_same(
                merged, names[layer], merge_one("linear", None, experts, "", weights=[weight, weight])
            )
        half = merge_one("linear", None, [two[names[1]]], "", weights=[0.5], normalize=False)
        assert_same(merged, names[2], half)
        for layer in (0, 1):
            experts = [model[names[layer]] for model in (one, two, three)]
            assert_same(merged, names[3 + layer], merge_one("linear", None, experts, "", weights=[0.5] * 3))
    first, last = "model.embed_tokens.weight", "model.norm.weight"
    assert_same(merged, first, merge_one("linear", None, [one[first], two[first]], "", weights=[0.25, 0.25]))
    experts = [model[last] for model in (one, two, three)]
    assert_same(merged, last, merge_one("linear", None, experts, "", weights=[0.5] * 3))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5


def test_a_slice_may_have_its_own_base_and_its_other_layers(family: Family, tmp_path: Path) -> None:
    text = recipe_of(
        family,
        "ties",
        base_model="base",
        slices=[
            {"sources": [*sources(0, layers=(1, 2)), *sources("base", layers=(0, 1))]},
            {"base_model": "base", "sources": [*sources("base", layers=(1, 2)), *sources(2, layers=(0, 1))]},
        ],
        parameters={"weight": 1, "density": 0.4},
    )
    plan = pymerge.plan(text)
    assert (plan.experts, [source.is_base for source in plan.inputs]) == (2, [True, False, False])
    pymerge.merge(text, tmp_path / "out")
    merged = read_checkpoint(tmp_path / "out")
    for name, x in merged.items():
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            rest = name.removeprefix(f"model.layers.{layer}.")
            base = family.base[f"model.layers.{layer}.{rest}"]
            expert = family.experts[2 * layer][f"model.layers.{1 - layer}.{rest}"]
            wanted = merge_one("ties", base, [expert], name, weights=[1.0], densities=[0.4])
            assert torch.equal(bits(x), bits(wanted)), name


def test_the_merged_slices_load_with_transformers(family: Family, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    text = recipe_of(
        family,
        "linear",
        slices=[{"sources": sources(0)}, {"sources": sources(1, layers=(0, 1))}] * 2,
        parameters={"weight": 1},
    )
    pymerge.merge(text, tmp_path / "out")
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_slices_say_where_layers_come_from(family: Family) -> None:
    plan = planned(
        family,
        "linear",
        slices=[{"sources": sources(0)}, {"sources": sources(0, 1, layers=(0, 1))}],
        parameters={"weight": [1, 3]},
    )
    text = plan.describe()
    one, two = family.expert_paths[:2]
    assert (
        f"slice        0, layers 0 to 1 of the output\nexpert       {one}, its layers 0 to 1 (weight 1 .. 3)"
        in text
    )
    assert (
        f"slice        1, layers 2 to 2 of the output\nexpert       {one}, its layers 0 to 0 (weight 3)"
        in text
    )
    assert plan.summary()["slices"] == 2
    assert plan.notes == (
        "outside the layers: 'model.embed_tokens.weight' from the sources of slices[0]",
        "outside the layers: 'model.norm.weight' from the sources of slices[1]",
        "all 2 sources of slices[1] give what comes after the layers; mergekit 0.1.5 leaves out those past"
        " the 1 of slices[0]",
    )
    assert str(two) in text


@pytest.mark.parametrize(
    ("top", "starts"),
    [
        (
            {"slices": [{"sources": sources(0, layers=(1, 3))}]},
            ["slices[0]: layers 1 to 2 of {one}, which has 0 to 1"],
        ),
        (
            {"slices": [{"sources": [*sources(0), *sources(1, layers=(0, 1))]}]},
            ["slices[0]: every source must give as many layers, found 2 of {one}, 1 of {two}"],
        ),
        (
            {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources(0)}]},
            ["slices[0]: sources must list the layers of the base {base} too"],
        ),
        (
            {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources("base")}]},
            ["slices[0]: sources list no expert beside the base {base}"],
        ),
        (
            {"merge_method": "ties", "slices": [{"sources": sources(0)}]},
            ["slices[0]: ties needs base_model: the model that the experts were tuned from"],
        ),
        (
            {
                "merge_method": "ties",
                "base_model": "base",
                "slices": [{"sources": sources(0, "base")}] * 2,
                "parameters": {"weight": 1, "density": 0.5, "scope": "model"},
            },
            ["scope: model takes each expert's entries over the whole model, which several slices"],
        ),
    ],
)
def test_slices_that_do_not_fit(top: dict[str, Any], starts: list[str], family: Family) -> None:
    given = {"parameters": {"weight": 1}, **top}
    found = problems(family, given.pop("merge_method", "linear"), **given)
    one, two = family.expert_paths[:2]
    assert len(found) == len(starts)
    for sentence, start in zip(found, starts, strict=True):
        assert sentence.startswith(start.format(one=one, two=two, base=family.base_path))


def test_the_number_of_layers_in_a_config() -> None:
    config = {
        "n_layer": 3,
        "layer_types": ["a", "b", "c"],
        "other": [1, 2, 3],
        "text_config": {"num_layers": 3},
    }
    made = json.loads(with_layers(json.dumps(config).encode(), [2, 2, 0, 1]))
    assert made == {
        "n_layer": 4,
        "layer_types": ["c", "c", "a", "b"],
        "other": [1, 2, 3],
        "text_config": {"num_layers": 4},
    }
    assert states_layers(b'{"text_config": {"num_layers": 3}}')
    assert not states_layers(b'{"hidden_size": 3}')
