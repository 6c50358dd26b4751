"""Sweeps of checkpoints: every output is that of a merge of its own; what is finished is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made import recipe_text, write_checkpoint

import pymerge
from pymerge.backends.native import NativeRun, Report
from pymerge.cli import main
from pymerge.errors import OutputError, ProblemList, PymergeError
from pymerge.plan_variants import plan_variants
from pymerge.recipe import parse_documents
from pymerge.run import local
from pymerge.sweep_settings import grid, with_setting

SHAPES = {"a.weight": (40, 50), "b.weight": (300, 100), "norm": (8,), "empty": (0, 3), "scalar": ()}
SMALL = 30_000  # bytes of a shard
VALUES: Mapping[str, Sequence[float]] = {"density": [0.2, 0.6], "lambda": [1, 0.5], "weight": [1.0, 0.25]}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes=SHAPES, shards=1 + seed)
    return tmp_path


def recipe(family: Path, method: str = "ties", **parameters: object) -> str:
    models = [family / "one", family / "two"]
    return recipe_text(method, models, family / "base", weight=0.5, density=0.9, **parameters)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("ties", {}),
        ("ties", {"scope": "model"}),
        ("dare_ties", {}),
        ("breadcrumbs", {"gamma": 0.05}),
        ("della", {"epsilon": 0.05}),
    ],
)
def test_every_output_is_that_of_its_own_merge(method: str, own: dict[str, object], family: Path) -> None:
    text = recipe(family, method, **own)
    results = pymerge.sweep(text, family / "out", VALUES, max_shard_size=SMALL)
    assert [result.setting for result in results] == grid(VALUES)
    assert len({result.out.name for result in results}) == 8
    for number, result in enumerate(results):
        assert result.summary is not None
        assert (result.summary.tensors, result.summary.nan_outputs) == (len(SHAPES), 0)
        alone = family / f"alone{number}"
        pymerge.merge(result.out / "mergekit_config.yml", alone, max_shard_size=SMALL)
        found = weights(result.out)
        assert len(found) == result.summary.shards > 1
        assert found == weights(alone)
        manifest = json.loads((result.out / "merge.manifest.json").read_text())
        assert sum(entry.get("tensors", 0) for entry in manifest["files"].values()) == len(SHAPES)
    assert sorted(path.name for path in (family / "out").iterdir()) == sorted(r.out.name for r in results)


def test_a_setting_holds_for_all_models_layers_and_modules() -> None:
    text = """
merge_method: ties
base_model: base
parameters: {density: 0.1, normalize: false}
slices:
  - sources:
      - {model: one, layer_range: [0, 2], parameters: {density: [0.1, 0.9], weight: 2}}
      - {model: two, layer_range: [0, 2]}
    parameters: {density: 0.5}
"""
    (document,) = parse_documents(text, Path("."))
    with pytest.raises(ProblemList):  # the models do not exist
        plan_variants(document, [{"density": 0.3}], None)
    changed = with_setting(document, {"density": 0.3, "seed": 7})
    (again,) = parse_documents(changed.text, Path("."))
    assert again.value == changed.value
    assert changed.value == {
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": False, "density": 0.3},
        "seed": 7,
        "slices": [
            {
                "sources": [
                    {"model": "one", "layer_range": [0, 2], "parameters": {"weight": 2}},
                    {"model": "two", "layer_range": [0, 2]},
                ],
                "parameters": {},
            }
        ],
    }


def test_seeds_are_swept_too(family: Path) -> None:
    text = recipe(family, "dare_linear")
    results = pymerge.sweep(text, family / "out", [{"seed": seed} for seed in (0, 1.0, 2**64 - 1)])
    assert [result.out.name for result in results] == ["seed0", "seed1", f"seed{2**64 - 1}"]
    assert len({weights(result.out)["model.safetensors"] for result in results}) == 3
    pymerge.merge(text, family / "alone")
    assert weights(family / "alone") == weights(family / "out" / "seed0")


class Failing(NativeRun):
    """The compiled core, which stops before its second list of jobs."""

    calls = 0

    def execute(self) -> Report:
        Failing.calls += 1
        if Failing.calls == 2:
            raise KeyboardInterrupt
        return super().execute()


def test_an_interrupted_sweep_goes_on(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = recipe(family), family / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Failing, "calls", 0)
        patch.setattr(local, "NativeRun", Failing)
        with pytest.raises(KeyboardInterrupt):
            pymerge.sweep(text, out, VALUES, max_shard_size=SMALL)
    assert {path.suffix for path in out.iterdir()} == {".partial"}
    results = pymerge.sweep(text, out, VALUES, max_shard_size=SMALL)
    assert [result.summary and result.summary.shards_resumed for result in results] == [1] * 8
    whole = pymerge.sweep(text, family / "whole", VALUES, max_shard_size=SMALL)
    for result, other in zip(results, whole, strict=True):
        assert weights(result.out) == weights(other.out)


def test_what_is_there_is_kept_and_what_is_new_is_added(family: Path) -> None:
    text, out = recipe(family), family / "out"
    pymerge.sweep(text, out, {"density": [0.2, 0.4]})
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    results = pymerge.sweep(text, out, {"density": [0.2, 0.3, 0.4]})
    assert [result.summary is None for result in results] == [True, False, True]
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()}.items() <= before.items()
    (out / "density0.2" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(PymergeError, match="was changed after it was merged"):
        pymerge.sweep(text, out, {"density": [0.2]})
    with pytest.raises(PymergeError, match="is the merge of another plan"):
        pymerge.sweep(recipe(family, normalize=False), out, {"density": [0.3]})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "a setting of the sweep changes no parameter"),
        ([], "a sweep needs at least one setting"),
        ({"density": []}, "a sweep needs at least one setting"),
        ({"density": [0.2, 0.2]}, "two settings of the sweep are the same: density0.2"),
        ({"density": [float("nan")]}, "density of a setting is nan, expected a finite number"),
        ({"density": ["0.2"]}, "density of a setting is '0.2', expected a finite number"),
        ({"density": [2]}, "density of .* is 2.0, which is outside 0 to 1"),
        ({"../x": [2]}, "'../x' cannot be the name of a parameter"),
        ({"dense": [0.2]}, "unknown key 'dense'; did you mean density"),
        ({"seed": [0.5]}, "seed of a setting is 0.5, expected a whole number"),
        ({"scope": [1]}, "scope"),
        ({"scope": ["tensor", "model"]}, "scope-model and scope-tensor differ in scope"),
        ({"density": [10**400]}, "expected a finite number"),
        ("density", "the settings of the sweep are 'density', expected values for each parameter"),
        (None, "the settings of the sweep are None"),
        (["density"], "a setting of the sweep is 'density', expected a value for each parameter"),
        ([None], "a setting of the sweep is None"),
        ({"density": 0.2}, "density of the sweep is 0.2, expected a list of values"),
    ],
)
def test_wrong_settings(settings: object, sentence: str, family: Path) -> None:
    with pytest.raises(PymergeError) as caught:
        pymerge.sweep(recipe(family), family / "out", settings)  # type: ignore[arg-type]
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert not (family / "out").exists()


def test_flags_words_and_other_kinds_of_numbers(family: Path) -> None:
    values: dict[str, Any] = {
        "normalize": [True, False],
        "lambda_": np.array([0.5], np.float32),
        "threshold_ties": ["all"],
    }
    results = pymerge.sweep(recipe(family), family / "out", values)
    assert [result.out.name for result in results] == [
        "normalize-true-lambda0.5-threshold_ties-all",
        "normalize-false-lambda0.5-threshold_ties-all",
    ]
    for number, result in enumerate(results):
        alone = family / f"alone{number}"
        text = recipe(family, normalize=number == 0, threshold_ties="all", lambda_=0.5)
        pymerge.merge(text, alone)
        assert weights(result.out) == weights(alone)


def test_settings_without_effect_are_refused(family: Path) -> None:
    base = family / "base"
    text = recipe_text("task_arithmetic", [family / "one"], base)
    with pytest.raises(ProblemList, match=r"does the same with density0\.4 as with density0\.2"):
        pymerge.sweep(text, family / "out", {"density": [0.2, 0.4]})
    with pytest.raises(ProblemList, match="does the same with seed1 as with seed0"):
        pymerge.sweep(text, family / "out", {"seed": [0, 1]})
    assert not (family / "out").exists()


def test_a_copy_and_a_multiple(family: Path) -> None:
    text = recipe_text("passthrough", [family / "one"], None)
    results = pymerge.sweep(text, family / "out", {"scale": [1, 0.5, 2]}, max_shard_size=SMALL)
    for number, result in enumerate(results):
        pymerge.merge(result.out / "mergekit_config.yml", family / f"s{number}", max_shard_size=SMALL)
        assert weights(result.out) == weights(family / f"s{number}")


@pytest.mark.parametrize(
    "name", ["1e5", "1e-3", "12e03", "-.5", "3e+4", "1:30", "2026-01-31", "a\x85b", "no"]
)
def test_names_that_look_like_something_else(name: str, family: Path) -> None:
    write_checkpoint(family / name, 5, shapes=SHAPES)
    (family / "recipe.yml").write_text(recipe_text("task_arithmetic", ["one", name], "base"))
    (result,) = pymerge.sweep(family / "recipe.yml", family / "out", {"lambda": [0.5]})
    text = (result.out / "mergekit_config.yml").read_text()
    pymerge.merge(pymerge.parse_recipe(text, family), family / "alone")
    assert weights(result.out) == weights(family / "alone")


def test_a_recipe_that_contains_itself(family: Path) -> None:
    text = recipe(family).replace("{", "{x: &p [*p], ", 1)
    with pytest.raises(PymergeError, match="the recipe contains itself"):
        pymerge.sweep(text, family / "out", VALUES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threads": "2"}, "threads is '2', expected a whole number"),
        ({"threads": 1.5}, "threads is 1.5, expected a whole number"),
        ({"max_shard_size": 1.5}, "max_shard_size is 1.5"),
        ({"dtype": 3}, "dtype is 3"),
    ],
)
def test_options_of_wrong_types(options: dict[str, Any], sentence: str, family: Path) -> None:
    for call in (
        lambda: pymerge.sweep(recipe(family), family / "out", VALUES, **options),
        lambda: pymerge.merge(recipe(family), family / "out", **options),
    ):
        with pytest.raises(PymergeError, match=re.escape(sentence)):
            call()
    assert not (family / "out").exists()


def test_a_parsed_recipe_is_refused(family: Path) -> None:
    parsed = pymerge.parse_recipe(recipe(family), family)
    with pytest.raises(PymergeError, match="a sweep takes a recipe's path or text"):
        pymerge.sweep(parsed, family / "out", VALUES)  # type: ignore[arg-type]


def test_outputs_do_not_go_into_a_merge(family: Path) -> None:
    pymerge.merge(recipe(family), family / "merged")
    with pytest.raises(ProblemList, match="is a merge; a sweep wants a folder of its own"):
        pymerge.sweep(recipe(family), family / "merged", VALUES)


def test_a_wrong_recipe_is_told_once(family: Path) -> None:
    text = recipe(family).replace("/one", "/none")
    with pytest.raises(ProblemList) as caught:
        pymerge.sweep(text, family / "out", VALUES)
    assert len(caught.value.problems) == 1


def test_too_little_disk_space(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe(family)
    one = pymerge.plan(text).disk_bytes
    monkeypatch.setattr("pymerge.plan_variants.free_bytes", lambda out: 2 * one)
    with pytest.raises(ProblemList, match="the sweep needs"):
        pymerge.sweep(text, family / "out", {"density": [0.2, 0.3, 0.4]})


def test_an_output_that_appears_meanwhile_is_not_overwritten(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(NativeRun):
        def execute(self) -> Report:
            (family / "out" / "density0.3").mkdir()
            return super().execute()

    monkeypatch.setattr(local, "NativeRun", Late)
    with pytest.raises(OutputError, match="exists already"):
        pymerge.sweep(recipe(family), family / "out", {"density": [0.2, 0.3]})
    assert list((family / "out" / "density0.3").iterdir()) == []


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sweep", *arguments])
    return result.exit_code, result.output


def test_the_command(family: Path) -> None:
    (family / "recipe.yml").write_text(recipe(family))
    names = [str(family / "recipe.yml"), str(family / "out")]
    code, output = run(*names, "--density", "0.2,0.4", "--set", "normalize=0")
    assert code == 2
    assert "normalize" in output
    code, output = run(*names, "--density", "0.2,0.4", "--set", "lambda=1,0.5")
    assert code == 0, output
    assert "density0.4-lambda0.5" in output
    assert "4 merges in" in output
    code, output = run(*names, "--density", "0.2,0.4", "--set", "lambda=1,0.5")
    assert (code, output.count("merged before, kept")) == (0, 4)
    code, output = run(names[0], str(family / "json"), "--lambda", "1,2", "--json")
    assert [row["setting"] for row in json.loads(output)] == [{"lambda": 1.0}, {"lambda": 2.0}]
    code, output = run(names[0], str(family / "more"), "--lambda", "1", "--lambda", "2", "--set", "lambda=3")
    assert sorted(path.name for path in (family / "more").iterdir()) == ["lambda1", "lambda2", "lambda3"]
    flags = ["--set", "normalize=true,false", "--set", "threshold_ties=first"]
    code, output = run(names[0], str(family / "flags"), *flags)
    assert code == 0, output


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--density", "0.2,x"],
        ["--density", ""],
        ["--set", "density"],
        ["--lambda", "1", "--set", "lambda=1"],
    ],
)
def test_wrong_options(options: list[str], family: Path) -> None:
    (family / "recipe.yml").write_text(recipe(family))
    code, output = run(str(family / "recipe.yml"), str(family / "out"), *options)
    assert code == 2
    assert "Traceback" not in output
    assert not (family / "out").exists()
