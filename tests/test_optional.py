"""Tensors that only some models have: merged from those, as far as the method can; the plan says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import read_checkpoint, write_checkpoint, write_recipe
from torch import Tensor

import pymerge
from pymerge.backends import reference
from pymerge.errors import PymergeError

COMMON, FIRST, OTHERS, ENDS = "up.weight", "only_first.bias", "others.bias", "ends.bias"


def family(folder: Path) -> list[dict[str, Tensor]]:
    """Three models: a tensor in all, one in the first, one in the others, one in the first and the last."""
    g = torch.Generator().manual_seed(5)
    models = []
    for number in range(3):
        names = [COMMON, *([FIRST] if number == 0 else [OTHERS]), *([ENDS] if number != 1 else [])]
        models.append({name: torch.randn(40, generator=g) for name in names})
        write_checkpoint(folder / f"m{number}", models[-1], 1)
    return models


def run(folder: Path, method: str, order: Sequence[int], base: int | None, **more: Any) -> dict[str, Tensor]:
    recipe = write_recipe(
        folder / "recipe.yml",
        method,
        [folder / f"m{n}" for n in order],
        None if base is None else folder / f"m{base}",
        **more,
    )
    pymerge.merge(recipe, folder / "out")
    return read_checkpoint(folder / "out")


def test_an_average_is_of_those_that_have_it(tmp_path: Path) -> None:
    models = family(tmp_path)
    each = [{"weight": w} for w in (1.0, 2.0, 5.0)]
    found = run(tmp_path, "linear", [0, 1, 2], None, each=each)
    assert set(found) == {COMMON, FIRST, OTHERS, ENDS}
    rules = {j.name: j.rule for s in pymerge.plan(tmp_path / "recipe.yml").jobs for j in s}
    for name, x in found.items():
        rule = rules[name]
        assert rule is not None
        holders = [n for n in range(3) if name in models[n]]
        assert rule.weights == tuple((1.0, 2.0, 5.0)[n] for n in holders)
        experts = [models[n][name] for n in holders]
        assert torch.equal(x, reference.merge_group([name], None, [experts], rule, [x.dtype], None)[0])


def test_task_vectors_are_of_those_that_have_it_and_the_base_stays_without_any(tmp_path: Path) -> None:
    models = family(tmp_path)
    for number in (1, 2):
        write = {name: x for name, x in models[number].items() if name != OTHERS}
        write_checkpoint(tmp_path / f"less{number}", write, 1)
    each = [{"weight": 1.0}, {"weight": 0.5}]
    paths = [tmp_path / "less1", tmp_path / "less2"]
    recipe = write_recipe(tmp_path / "recipe.yml", "task_arithmetic", paths, tmp_path / "m0", each=each)
    pymerge.merge(recipe, tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    base, _, last = models
    assert torch.equal(found[FIRST], base[FIRST])
    assert torch.equal(found[ENDS], base[ENDS] + (last[ENDS] - base[ENDS]) * 0.5)
    notes = pymerge.plan(recipe).notes
    both = f"expert {paths[0]} and expert {paths[1]} lack"
    assert f"tensor '{FIRST}', which {both}: each is base {tmp_path / 'm0'}'s" in notes
    said = f"tensor '{ENDS}', which expert {paths[0]} lacks: each is merged from the 2 that have it"
    assert said in notes


def test_a_blend_of_one_model_is_that_model(tmp_path: Path) -> None:
    models = family(tmp_path)
    found = run(tmp_path, "slerp", [0, 1], 0, each=[{}, {}], parameters={"t": 0.25})
    assert torch.equal(found[FIRST], models[0][FIRST])
    assert torch.equal(found[OTHERS], models[1][OTHERS])


def test_model_stock_leaves_out_what_too_few_have(tmp_path: Path) -> None:
    models = family(tmp_path)
    found = run(tmp_path, "model_stock", [1, 2], 0, each=[{}, {}])
    assert set(found) == {COMMON, FIRST}
    assert torch.equal(found[FIRST], models[0][FIRST])
    assert any(note.startswith("left out: tensor") for note in pymerge.plan(tmp_path / "recipe.yml").notes)


def test_task_vectors_need_the_base(tmp_path: Path) -> None:
    family(tmp_path)
    with pytest.raises(PymergeError) as caught:
        run(tmp_path, "ties", [1, 2], 0)
    assert f"ties cannot merge tensor '{OTHERS}', which base {tmp_path / 'm0'} lacks" in str(caught.value)


def test_one_threshold_for_all_needs_all_tensors(tmp_path: Path) -> None:
    family(tmp_path)
    with pytest.raises(PymergeError, match="which tensors that some of them lack do not have"):
        run(tmp_path, "ties", [1], 2, parameters={"scope": "model", "density": 0.5})


def test_other_tensors_must_be_in_every_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m0", {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, 1)
    write_checkpoint(tmp_path / "m1", {"a.weight": torch.ones(3)}, 1)
    with pytest.raises(PymergeError, match=r"lacks tensor 'b\.weight'"):
        run(tmp_path, "linear", [0, 1], None)


def test_shapes_are_compared_among_those_that_have_it(tmp_path: Path) -> None:
    for number, width in ((1, 3), (2, 4)):
        tensors = {"a.weight": torch.ones(3), "x.bias": torch.ones(width)}
        write_checkpoint(tmp_path / f"m{number}", tensors, 1)
    write_checkpoint(tmp_path / "m0", {"a.weight": torch.ones(3)}, 1)
    with pytest.raises(PymergeError, match=r"tensor 'x\.bias' has shape \[4\], expected \[3\]"):
        run(tmp_path, "linear", [0, 1, 2], None)


def test_one_expert_beside_the_base_is_the_mean_direction(tmp_path: Path) -> None:
    """As where a recipe has but one expert: multislerp leaves nothing to blend."""
    models = family(tmp_path)
    found = run(tmp_path, "multislerp", [1, 2], 0)
    assert torch.equal(found[ENDS], models[2][ENDS])


def test_votes_of_a_consensus_are_at_most_those_that_have_it(tmp_path: Path) -> None:
    models = family(tmp_path)
    only = models[2] | {"only.bias": torch.ones(40)}
    write_checkpoint(tmp_path / "only", only, 1)
    base = {name: x for name, x in models[2].items() if name != ENDS} | {"only.bias": torch.zeros(40)}
    write_checkpoint(tmp_path / "base", base | {ENDS: torch.zeros(40)}, 1)
    recipe = write_recipe(
        tmp_path / "recipe.yml",
        "consensus",
        [tmp_path / "only", tmp_path / "m2"],
        tmp_path / "base",
        parameters={"votes": 2},
    )
    plan = pymerge.plan(recipe)
    votes = {job.name: job.rule.fuse.votes for s in plan.jobs for job in s if job.rule and job.rule.fuse}
    assert votes == {COMMON: 2, OTHERS: 2, ENDS: 2, "only.bias": 1}
    assert any("'only.bias'" in note and "of which at most 1 can vote" in note for note in plan.notes)
    pymerge.merge(recipe, tmp_path / "out")
    assert torch.equal(read_checkpoint(tmp_path / "out")["only.bias"], torch.ones(40))


def test_votes_of_all_are_still_too_many(tmp_path: Path) -> None:
    family(tmp_path)
    paths = [tmp_path / "m1", tmp_path / "m2"]
    recipe = write_recipe(tmp_path / "r.yml", "consensus", paths, tmp_path / "m1", parameters={"votes": 2})
    with pytest.raises(PymergeError, match="votes is 2, more than the 1 experts"):
        pymerge.plan(recipe)
