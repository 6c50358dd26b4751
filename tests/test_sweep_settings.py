"""The settings of a sweep: of all models, of one, too many, and what is planned of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made import recipe_text, write_checkpoint

import pymerge
from pymerge.cli import main
from pymerge.errors import PymergeError
from pymerge.recipe import parse_documents
from pymerge.sweep_settings import with_setting

SHAPES = {"a.weight": (40, 50), "norm": (8,)}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes=SHAPES)
    return tmp_path


def recipe(family: Path) -> str:
    return recipe_text("ties", [family / "one", family / "two"], family / "base", weight=0.5, density=0.9)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_one_model_s_weight(family: Path) -> None:
    values = {"weight@one": [0.5, 1.5], "weight@two": [0.25], "density": [0.4]}
    results = pymerge.sweep(recipe(family), family / "out", values)
    names = [f"weight@one={first}-weight@two=0.25-density0.4" for first in ("0.5", "1.5")]
    assert [result.out.name for result in results] == names
    for result, first in zip(results, (0.5, 1.5), strict=True):
        (document,) = parse_documents(recipe(family), family)
        assert isinstance(document.value, dict)
        entries = [entry for entry in document.value["models"] if "parameters" in entry]
        for entry, weight in zip(entries, (first, 0.25), strict=True):
            entry["parameters"] = {"weight": weight, "density": 0.4}
        pymerge.merge(json.dumps(document.value, indent=1), family / f"alone{first}")
        assert weights(result.out) == weights(family / f"alone{first}")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("weight@three", "the recipe has no model whose path ends so: "),
        ("weight@wo", "the recipe has no model whose path ends so: "),
        ("weight@", "'weight@' cannot be the name of a parameter, nor NAME@MODEL"),
        ("weight@/", "'weight@/' cannot be"),
        ("weight@a\nb", "cannot be the name of a parameter"),
        ("seed@one", "'seed@one' cannot be the name of a parameter"),
        ("@one", "'@one' cannot be the name of a parameter"),
        ("weigth@one", "did you mean"),
    ],
)
def test_a_model_or_parameter_that_is_not_there(key: str, sentence: str, family: Path) -> None:
    with pytest.raises(PymergeError, match=re.escape(sentence)):
        pymerge.sweep(recipe(family), family / "out", {key: [0.5]})


def test_two_models_of_one_name(family: Path) -> None:
    write_checkpoint(family / "more" / "one", 3, shapes=SHAPES)
    models = [family / "one", family / "more" / "one"]
    text = recipe_text("ties", models, family / "base", weight=1, density=0.5)
    with pytest.raises(PymergeError, match=f"several models whose paths end so: {models[0]}, {models[1]}"):
        pymerge.sweep(text, family / "out", {"weight@one": [0.5]})
    (result,) = pymerge.sweep(text, family / "out", {"weight@more/one": [0.5]})
    assert result.out.name == "weight@more_one=0.5"
    recipe = (result.out / "mergekit_config.yml").read_text()
    (document,) = parse_documents(recipe, family)
    assert isinstance(document.value, dict)
    assert [entry["parameters"]["weight"] for entry in document.value["models"]] == [1, 0.5]


def test_loras_of_one_model_are_models_of_their_own() -> None:
    text = """
merge_method: linear
models:
  - {model: {model: {path: a/one, revision: main}, lora: l/first}}
  - {model: a/one+l/second}
  - {model: a/one}
"""
    (document,) = parse_documents(text, Path("."))
    for model, number in (("first", 0), ("a/one@main+l/first", 0), ("second", 1), ("one", 2), ("a/one", 2)):
        changed = with_setting(document, {f"weight@{model}": 0.5})
        assert isinstance(changed.value, dict)
        given = [number for number, entry in enumerate(changed.value["models"]) if "parameters" in entry]
        assert given == [number]


def test_what_is_written_out_wins() -> None:
    (document,) = parse_documents("merge_method: linear\nmodels: [{model: one}, {model: p/one}]\n", Path("."))
    changed = with_setting(document, {"weight@one": 0.5})
    assert isinstance(changed.value, dict)
    assert [len(entry) for entry in changed.value["models"]] == [2, 1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([{"lambda": 0.1, "lambda_": 0.2}], "lambda is given twice in a setting"),
        ([{"weight@one": 0.1, "weight@/one": 0.2}], "is given twice in a setting"),
        ([{"weight@one": 10**5000}], "something too long to be shown (int)"),
        ({"density": 10**5000}, "something too long to be shown (int)"),
        ([10**5000], "something too long to be shown (int)"),
        ([{"weight@m,x": 0.1}, {"weight@m_x": 0.1}], "two settings of the sweep would have the same folder"),
        ([{"density": 0.1}, {"density": 0.1}], "two settings of the sweep are the same: density0.1"),
        ([{f"weight@{'m' * 250}": 0.1}], "too long for the name of a folder"),
    ],
)
def test_wrong_settings(settings: Any, sentence: str, family: Path) -> None:
    with pytest.raises(PymergeError, match=re.escape(sentence)):
        pymerge.plan_sweep(recipe(family), family / "out", settings)


def test_a_recipe_that_contains_itself() -> None:
    text = "merge_method: ties\nbase_model: b\nmodels: &m\n - model: one\n   parameters: {weight: 1, x: *m}\n"
    with pytest.raises(PymergeError, match="the recipe contains itself"):
        pymerge.plan_sweep(text, "out", {"weight@one": [0.1]})


@pytest.mark.parametrize("out", [None, 5, b"x", ["x"]])
def test_what_is_no_folder(out: Any, family: Path) -> None:
    for call in (
        lambda: pymerge.plan_sweep(recipe(family), out, {"density": [0.5]}),
        lambda: pymerge.merge(recipe(family), out),
    ):
        with pytest.raises(PymergeError, match=r"out is a .*, expected the path of a folder"):
            call()


def test_names_that_end_in_digits_stay_apart(family: Path) -> None:
    for name in ("m-1", "m-11"):
        write_checkpoint(family / name, 5, shapes=SHAPES)
    text = recipe_text("ties", [family / "m-1", family / "m-11"], family / "base", weight=1, density=0.5)
    results = pymerge.sweep(text, family / "out", [{"weight@m-1": 10}, {"weight@m-11": -0.5}])
    assert [result.out.name for result in results] == ["weight@m-1=10", "weight@m-11=-0.5"]


def test_too_many_settings(family: Path) -> None:
    values = {name: [0.1] * 1000 for name in ("density", "weight", "lambda")}
    with pytest.raises(PymergeError, match=re.escape("the sweep has 1,000,000,000 settings, at most 10,000")):
        pymerge.sweep(recipe(family), family / "out", values)


def test_a_plan_of_a_sweep(family: Path) -> None:
    (first, second) = pymerge.plan_sweep(recipe(family), family / "out", {"density": [0.2, 0.4]})
    assert (first.name, second.name, first.done) == ("density0.2", "density0.4", False)
    assert first.plan.rules[0].densities == (0.2, 0.2)
    assert not (family / "out").exists()
    (family / "recipe.yml").write_text(recipe(family))
    names = [str(family / "recipe.yml"), str(family / "out"), "--density"]
    assert run(*names, "0.2")[0] == 0
    code, output = run(*names, "0.2,0.4", "--dry-run")
    assert code == 0, output
    assert "density0.2: merged before, kept" in output
    assert f"1 to merge, {second.plan.disk_bytes:,} bytes on disk" in output
    code, output = run(*names, "0.2,0.4", "--dry-run", "--json")
    assert [row["done"] for row in json.loads(output)] == [True, False]
    assert not (family / "out" / "density0.4").exists()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sweep", *arguments])
    return result.exit_code, result.output


def test_more_outputs_than_files_may_be_open(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymerge.run.local.raise_file_limit", lambda: 12)
    densities = [round(0.1 * number, 1) for number in range(1, 9)]
    with pytest.raises(PymergeError, match="8 outputs together need 19 open files, this system allows 12"):
        pymerge.sweep(recipe(family), family / "out", {"density": densities})
    assert not (family / "out").exists()
