"""End to end: sharded checkpoints in, a loadable checkpoint out, equal to the reference bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import METHODS, bits
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
from pymerge.methods import METHODS as METHOD_TABLE
from pymerge.planner import Plan, make_plan
from pymerge.recipe import load_recipe
from pymerge.rule import Rule, Scope, ThresholdTies
from pymerge.ruling import rule_for
from pymerge.run.local import execute_plan

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WEIGHTS = (1.0, 0.5, -0.3)
DENSITIES = (0.2, 0.5, 0.35)
SHARD_BYTES = 150_000
PLAIN = Settings(threads=2)


@pytest.fixture(scope="module", params=DTYPES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp(request.param), DTYPES[request.param])


@pytest.fixture(scope="module")
def bf16_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


def rule_and_recipe(
    path: Path,
    family: Family,
    method: str,
    scope: Scope = Scope.TENSOR,
    ties: ThresholdTies = ThresholdTies.FIRST,
    **top: Any,
) -> tuple[Rule, Path]:
    """One merge of the family, as the reference and as pymerge are told of it."""
    rule = rule_for(
        METHOD_TABLE[method], weights=WEIGHTS, densities=DENSITIES, threshold_ties=ties, scope=scope, seed=5
    )
    trims = METHODS[method][0] and method != "task_arithmetic"
    each = [
        {"weight": w, "density": d} if trims else {"weight": w}
        for w, d in zip(WEIGHTS, DENSITIES, strict=True)
    ]
    parameters = {"scope": scope.value, "threshold_ties": ties.value} if rule.trim.by_magnitude else {}
    base = family.base_path if rule.task_vector else None
    recipe = write_recipe(path, method, family.expert_paths, base, parameters, each, seed=5, **top)
    return rule, recipe


def planned(recipe: Path, out: Path) -> Plan:
    return make_plan(load_recipe(recipe), out, max_shard_bytes=SHARD_BYTES)


def assert_holds(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """The checkpoint holds exactly these tensors, bit for bit."""
    merged = read_checkpoint(out)
    assert merged.keys() == expected.keys()
    for name, want in expected.items():
        got = merged[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        assert torch.equal(bits(got), bits(want)), (
            f"{name}: {int((bits(got) != bits(want)).sum())} elements differ"
        )


# -- equal to the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", list(ThresholdTies))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference(
    family: Family, method: str, scope: Scope, ties: ThresholdTies, tmp_path: Path
) -> None:
    rule, recipe = rule_and_recipe(tmp_path / "recipe.yml", family, method, scope, ties)
    out = tmp_path / "out"
    pymerge.merge(recipe, out)
    stored = next(iter(family.base.values())).dtype
    assert_holds(out, expected_merge(family, rule, stored))


@pytest.mark.parametrize("ties", list(ThresholdTies))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("route", ["plain", "missed bracket", "overflowing list"])
def test_ties_by_every_route(
    bf16_family: Family, scope: Scope, ties: ThresholdTies, route: str, tmp_path: Path
) -> None:
    rule, recipe = rule_and_recipe(tmp_path / "recipe.yml", bf16_family, "ties", scope, ties)
    settings = {
        "plain": PLAIN,
        "missed bracket": dataclasses.replace(PLAIN, bracket_bias=0.3),
        "overflowing list": dataclasses.replace(PLAIN, memory=64, sigmas=20.0),
    }[route]
    out = tmp_path / "out"
    execute_plan(planned(recipe, out), out, settings, None)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_holds(out, expected_merge(bf16_family, rule, torch.bfloat16))


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_same_files_whatever_the_machine(
    bf16_family: Family, method: str, scope: Scope, tmp_path: Path
) -> None:
    """sha256 of the weights for every ISA, 1, 2 and 5 threads, three tile sizes, a miss and an overflow."""
    _, recipe = rule_and_recipe(tmp_path / "recipe.yml", bf16_family, method, scope)
    variants = [
        Settings(isa=isa, threads=threads, tile=tile)
        for isa, threads, tile in itertools.product(ISAS, (1, 2, 5), (1024, 32768, 131072))
    ]
    variants += [
        dataclasses.replace(PLAIN, bracket_bias=0.3),
        dataclasses.replace(PLAIN, memory=64, sigmas=20.0),
    ]
    digests = []
    for i, settings in enumerate(variants):
        out = tmp_path / f"out{i}"
        execute_plan(planned(recipe, out), out, settings, None)
        digests.append(weight_digests(out))
    assert len(digests[0]) > 2
    assert all(d == digests[0] for d in digests)


def test_types_mixed_across_models(tmp_path: Path) -> None:
    """A bf16 base, f16 and f32 experts: the result is f32 unless told otherwise."""
    made = make_family(tmp_path / "made", torch.float32)
    base = {name: x.bfloat16() for name, x in made.base.items()}
    dtypes = (torch.float16, torch.float32, torch.bfloat16)
    experts = tuple({n: x.to(d) for n, x in e.items()} for e, d in zip(made.experts, dtypes, strict=True))
    base_path = write_checkpoint(tmp_path / "base", base, 2)
    paths = tuple(write_checkpoint(tmp_path / f"e{k}", e, k + 1) for k, e in enumerate(experts))
    mixed = Family(base_path, paths, base, experts)
    cases: list[tuple[dict[str, Any], torch.dtype, torch.dtype | None]] = [
        ({}, torch.float32, None),
        ({"out_dtype": "float16"}, torch.float16, None),
        ({"dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16, torch.float32),
        ({"dtype": "float64"}, torch.float64, torch.float64),
    ]
    for i, (top, out_dtype, cast) in enumerate(cases):
        rule, recipe = rule_and_recipe(tmp_path / f"{i}.yml", mixed, "ties", **top)
        pymerge.merge(recipe, tmp_path / f"out{i}")
        assert_holds(tmp_path / f"out{i}", expected_merge(mixed, rule, out_dtype, cast))


def test_integers_and_bools_are_copied(tmp_path: Path) -> None:
    extra = {
        "ids": torch.arange(1000).reshape(10, 100),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7, dtype=torch.int32),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    made = make_family(tmp_path / "made", torch.bfloat16, extra=extra)
    for scope in Scope:
        rule, recipe = rule_and_recipe(tmp_path / "r.yml", made, "ties", scope)
        out = tmp_path / scope.value
        pymerge.merge(recipe, out)
        assert_holds(out, expected_merge(made, rule, torch.bfloat16) | extra)


def test_nan_elements_are_merged_and_counted(tmp_path: Path) -> None:
    made = make_family(tmp_path / "made", torch.bfloat16)
    broken = {name: x.clone() for name, x in made.experts[1].items()}
    broken["model.norm.weight"][:5] = torch.nan
    paths = (made.expert_paths[0], write_checkpoint(tmp_path / "broken", broken, 2), made.expert_paths[2])
    family = Family(made.base_path, paths, made.base, (made.experts[0], broken, made.experts[2]))
    rule, recipe = rule_and_recipe(tmp_path / "r.yml", family, "ties")
    summary = pymerge.merge(recipe, tmp_path / "out")
    assert summary.nan_outputs == 5
    expected = expected_merge(family, rule, torch.bfloat16)
    assert int(expected["model.norm.weight"].isnan().sum()) == 5
    assert_holds(tmp_path / "out", expected)


# -- the output folder --------------------------------------------------------------------------------------


def test_loads_with_transformers(bf16_family: Family, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    rule, recipe = rule_and_recipe(tmp_path / "recipe.yml", bf16_family, "ties")
    out = tmp_path / "out"
    execute_plan(planned(recipe, out), out, PLAIN, None)
    model, info = LlamaForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    for name, want in expected_merge(bf16_family, rule, torch.bfloat16).items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(bits(state[name]), bits(want)), name


def test_config_states_the_type_that_was_written(bf16_family: Family, tmp_path: Path) -> None:
    _, recipe = rule_and_recipe(tmp_path / "recipe.yml", bf16_family, "ties", out_dtype="float32")
    pymerge.merge(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))
    assert "bfloat16" not in config.values()
    assert {x.dtype for x in read_checkpoint(tmp_path / "out").values()} == {torch.float32}


def test_inputs_are_opened_for_reading_only(bf16_family: Family, tmp_path: Path) -> None:
    _, recipe = rule_and_recipe(tmp_path / "recipe.yml", bf16_family, "ties", Scope.MODEL)
    folders = (bf16_family.base_path, *bf16_family.expert_paths)
    before = [weight_digests(folder) for folder in folders]
    for path in itertools.chain.from_iterable(folder.iterdir() for folder in folders):
        path.chmod(0o444)
    pymerge.merge(recipe, tmp_path / "out")
    assert [weight_digests(folder) for folder in folders] == before


def test_symlinked_shards_are_followed(bf16_family: Family, tmp_path: Path) -> None:
    """The hub's cache keeps snapshots as links into a folder of blobs."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in bf16_family.expert_paths[2].iterdir():
        (linked / path.name).symlink_to(path)
    paths = (*bf16_family.expert_paths[:2], linked)
    family = dataclasses.replace(bf16_family, expert_paths=paths)
    rule, recipe = rule_and_recipe(tmp_path / "recipe.yml", family, "ties")
    pymerge.merge(recipe, tmp_path / "out")
    assert_holds(tmp_path / "out", expected_merge(family, rule, torch.bfloat16))
