"""Blends of checkpoints: mergekit's recipes, plans that tell the truth, files of the reference's bits."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from families import (
    Family,
    expected_merge,
    make_family,
    read_checkpoint,
    weight_digests,
    write_checkpoint,
    write_recipe,
)
from harness import ISAS

import pymerge
from pymerge.backends.native import Settings
from pymerge.errors import CheckpointError, ProblemList, PymergeError
from pymerge.methods import METHODS
from pymerge.plan_memory import TILE, budget
from pymerge.planner import Plan, make_plan
from pymerge.recipe import load_recipe
from pymerge.ruling import rule_for
from pymerge.run.local import execute_plan

BF16 = torch.bfloat16
# method, experts, base: named or among the models, parameters, in order of the reference's experts
CASES: dict[str, tuple[str, int, bool, dict[str, object]]] = {
    "slerp": ("slerp", 1, True, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, False, {}),
    "nuslerp base": ("nuslerp", 2, True, {}),
    "nuslerp rows": ("nuslerp", 2, True, {"nuslerp_flatten": False}),
    "nuslerp columns": ("nuslerp", 2, False, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", 3, True, {"normalize_weights": False, "eps": 0.01}),
    "multislerp 1": ("multislerp", 1, True, {}),
    "karcher": ("karcher", 3, False, {"max_iter": 5, "tol": 1e-9}),
    "karcher base": ("karcher", 2, True, {}),
    "model_stock": ("model_stock", 3, True, {}),
    "model_stock rows": ("model_stock", 3, True, {"filter_wise": True}),
    "passthrough": ("passthrough", 1, False, {}),
    "passthrough scale": ("passthrough", 1, False, {"scale": 0.5}),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), BF16)


def prepared(name: str, family: Family, folder: Path, **top: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """A recipe and what its merge must hold."""
    method, count, with_base, parameters = CASES[name]
    row = METHODS[method]
    weights = (0.5, 0.3, 0.4)[:count]
    each = [{"weight": w} if row.weighted else {} for w in weights]
    recipe = write_recipe(
        folder / "recipe.yml",
        method,
        family.expert_paths[:count],
        family.base_path if with_base else None,
        parameters,
        each,
        **top,
    )
    experts = family.experts[:count]
    if with_base and method in ("slerp", "karcher"):
        experts = (family.base, *experts) if method == "slerp" else (*experts, family.base)
        weights = (1.0,) * len(experts)
    rule = rule_for(row, weights=weights, options=parameters, has_base=with_base)
    out = torch.float32 if top.get("out_dtype") == "float32" else BF16
    return recipe, expected_merge(dataclasses.replace(family, experts=experts), rule, out)


def planned(recipe: Path, out: Path | None) -> Plan:
    return make_plan(load_recipe(recipe), out, max_shard_bytes=150_000)


def assert_holds(out: Path, expected: dict[str, torch.Tensor]) -> None:
    merged = read_checkpoint(out)
    assert merged.keys() == expected.keys()
    for name, want in expected.items():
        assert merged[name].dtype == want.dtype
        assert torch.equal(merged[name].view(torch.uint8), want.view(torch.uint8)), name


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, family: Family, tmp_path: Path) -> None:
    recipe, expected = prepared(name, family, tmp_path)
    plan = planned(recipe, tmp_path / "out")
    summary = execute_plan(plan, tmp_path / "out", Settings(threads=2))
    assert (summary.bytes_read, summary.bytes_written) == (
        plan.bytes_read,
        sum(x.nbytes for x in expected.values()),
    )
    assert_holds(tmp_path / "out", expected)


@pytest.mark.parametrize("name", ["slerp", "model_stock rows", "passthrough"])
def test_types_of_the_output(name: str, family: Family, tmp_path: Path) -> None:
    recipe, expected = prepared(name, family, tmp_path, out_dtype="float32")
    pymerge.merge(recipe, tmp_path / "out")
    assert_holds(tmp_path / "out", expected)


@pytest.mark.parametrize("name", ["karcher", "nuslerp rows", "nuslerp columns"])
def test_same_files_whatever_the_machine(name: str, family: Family, tmp_path: Path) -> None:
    recipe, _ = prepared(name, family, tmp_path)
    digests = []
    for i, (isa, threads, tile) in enumerate(itertools.product(ISAS, (1, 2, 5), (1024, 32768, 131072))):
        out = tmp_path / f"out{i}"
        execute_plan(planned(recipe, out), out, Settings(isa=isa, threads=threads, tile=tile))
        digests.append(weight_digests(out))
    assert all(d == digests[0] for d in digests)


def test_passthrough_is_the_same_file(family: Family, tmp_path: Path) -> None:
    """The base listed and named counts once, as in mergekit."""
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [family.base_path], family.base_path, None, [{}])
    pymerge.merge(recipe, tmp_path / "out")
    assert_holds(tmp_path / "out", family.base)
    scaled = write_recipe(
        tmp_path / "s.yml", "passthrough", [family.base_path], None, {"scale": 2.0}, [{"scale": 0.25}]
    )
    pymerge.merge(scaled, tmp_path / "scaled")
    merged = read_checkpoint(tmp_path / "scaled")
    assert all(torch.equal(merged[name], x * 0.25) for name, x in family.base.items())


def test_slerp_starts_at_the_base_wherever_it_is_listed(family: Family, tmp_path: Path) -> None:
    models = [family.expert_paths[0], family.base_path]
    outs = []
    for i, listed in enumerate((models, models[::-1], models[:1])):
        recipe = write_recipe(
            tmp_path / f"{i}.yml", "slerp", listed, family.base_path, {"t": 0.25}, [{}] * len(listed)
        )
        outs.append(tmp_path / f"out{i}")
        pymerge.merge(recipe, outs[-1])
    assert weight_digests(outs[0]) == weight_digests(outs[1]) == weight_digests(outs[2])


# -- plans --------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_read(family: Family, tmp_path: Path) -> None:
    """Long vectors are read twice, short ones once: here the embedding is long, its rows are not."""
    sizes = [x.nbytes for x in family.base.values()]
    long = max(sizes)
    for name, inputs, twice in (
        ("karcher", 3, True),
        ("model_stock", 4, True),
        ("model_stock rows", 4, False),
        ("nuslerp columns", 2, True),
        ("passthrough", 1, False),
    ):
        recipe, _ = prepared(name, family, tmp_path)
        plan = planned(recipe, None)
        assert plan.passes == (2 if twice else 1), name
        if name != "nuslerp columns":
            assert plan.bytes_read == inputs * (sum(sizes) + (long if twice else 0)), name
        assert f"passes over the inputs: {plan.passes}" in plan.describe()


def test_a_plan_states_the_parameters(family: Family, tmp_path: Path) -> None:
    texts = {name: planned(prepared(name, family, tmp_path)[0], None).describe() for name in CASES}
    assert "method       slerp, t 0.3\n" in texts["slerp"]
    assert "method       karcher, max_iter 5, tol 1e-09\n" in texts["karcher"]
    assert "method       nuslerp, by columns\n" in texts["nuslerp columns"]
    assert "method       model_stock, by rows\n" in texts["model_stock rows"]
    assert "weight" not in texts["karcher"]
    assert f"expert       {family.expert_paths[1]} (weight 0.3)" in texts["multislerp"]
    assert f"base         {family.base_path}" in texts["multislerp"]
    assert "base  " not in texts["multislerp 1"]


def test_memory_is_never_shared_out_below_what_is_read_at_once(family: Family, tmp_path: Path) -> None:
    plan = planned(prepared("karcher", family, tmp_path)[0], None)
    assert budget(plan, 2, 40_000_000).tile == TILE
    with pytest.raises(PymergeError, match="bytes of memory are too little"):
        budget(plan, 2, 1_000_000)


@pytest.mark.parametrize(
    ("method", "models", "base", "parameters", "sentence"),
    [
        ("slerp", 2, False, {"t": 0.5}, "slerp needs base_model: the model that t = 0 gives"),
        ("slerp", 2, True, {"t": 0.5}, "slerp takes exactly 2 models, the base among them, found 3"),
        ("slerp", 1, True, {}, "t must be given"),
        ("nuslerp", 3, False, {"weight": 1}, "nuslerp takes exactly 2 experts, found 3"),
        ("multislerp", 2, False, {}, "multislerp needs a weight for "),
        (
            "model_stock",
            2,
            False,
            {},
            "model_stock needs base_model: the model that the experts were tuned from",
        ),
        ("model_stock", 1, True, {}, "model_stock takes at least 2 experts, found 1"),
        (
            "karcher",
            2,
            False,
            {"max_iter": 2.5},
            "max_iter is 2.5, expected a whole number from 0 to 1,000,000",
        ),
        ("passthrough", 1, True, {}, "passthrough takes exactly one model, found 2"),
    ],
)
def test_bad_recipes(
    method: str,
    models: int,
    base: bool,
    parameters: dict[str, object],
    sentence: str,
    family: Family,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yml",
        method,
        family.expert_paths[:models],
        family.base_path if base else None,
        parameters,
        [{}] * models,
    )
    with pytest.raises(ProblemList) as caught:
        planned(recipe, None)
    assert any(problem.startswith(sentence) for problem in caught.value.problems), caught.value.problems


def test_what_has_no_effect_is_said(family: Family, tmp_path: Path) -> None:
    given = {"weight": 1.0, "density": 0.5, "lambda": 2.0, "normalize": True, "t": 0.5, "filter_wise": True}
    recipe = write_recipe(tmp_path / "r.yml", "karcher", family.expert_paths, None, given, [{}] * 3)
    assert set(planned(recipe, None).notes) == {f"{name} has no effect with karcher" for name in given}
    recipe = write_recipe(tmp_path / "r.yml", "linear", family.expert_paths, None, {"scale": 2.0})
    assert planned(recipe, None).notes == ("scale has no effect with linear",)


def test_directions_that_cancel_name_file_and_tensor(family: Family, tmp_path: Path) -> None:
    """Three times the base itself: task vectors of zero have no direction."""
    same = {name: torch.zeros_like(x) for name, x in family.base.items()}
    paths = [write_checkpoint(tmp_path / f"m{k}", same, 1) for k in range(3)]
    recipe = write_recipe(tmp_path / "r.yml", "multislerp", paths)
    with pytest.raises(
        CheckpointError, match=r"m0/model\.safetensors: tensor '.*': the weighted directions of the"
    ):
        pymerge.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
