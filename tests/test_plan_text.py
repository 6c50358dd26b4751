"""What a plan tells of its parameters, in words and as JSON, and what it notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made import write_checkpoint

import pymerge
from pymerge.dtypes import DType
from pymerge.errors import ProblemList, PymergeError
from pymerge.planner import Plan


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str) -> Plan:
    return pymerge.plan(text + "\n")


def parameters(text: str) -> Any:
    return planned(text).summary()["parameters"]


TIES = """
merge_method: ties
base_model: base
models:
  - {model: one, parameters: {weight: 2, density: [0.1, 0.5]}}
  - {model: two, parameters: {weight: [{filter: norm, value: 3}]}}
parameters: {weight: 1, lambda: [0, 1]}
"""


def test_parameters_as_json_have_the_form_of_the_recipe_and_every_default(family: Path) -> None:
    assert parameters(TIES) == [
        {
            "models": [
                {"model": f"{family}/base", "role": "base"},
                {"model": f"{family}/one", "role": "expert", "weight": 2.0, "density": [0.1, 0.5]},
                {
                    "model": f"{family}/two",
                    "role": "expert",
                    "weight": [{"filter": "norm", "value": 3.0}, {"filter": "*", "value": 1.0}],
                    "density": 1.0,
                },
            ],
            "lambda": [0.0, 1.0],
            "normalize": True,
            "rescale": False,
        }
    ]


def test_parameters_of_a_preset(family: Path) -> None:
    text = "merge_method: ties\npreset: fusionbench\nbase_model: base\nmodels: [{model: one}, {model: two}]"
    (found,) = parameters(text)
    assert (found["lambda"], found["normalize"]) == (0.3, False)
    assert [(model.get("weight"), model.get("density")) for model in found["models"]] == [
        (None, None),
        (1.0, 0.2),
        (1.0, 0.2),
    ]
    summary = planned(text).summary()
    assert (summary["preset"], summary["seed"]) == ("fusionbench", 0)


def test_the_start_of_an_arc_is_named(family: Path) -> None:
    text = "merge_method: slerp\nbase_model: two\nmodels: [{model: one}, {model: two}]\nparameters: {t: 0.2}"
    said = planned(text).describe()
    assert f"start        {family}/two (t = 0)\nexpert       {family}/one\n" in said
    (found,) = parameters(text)
    assert found["t"] == 0.2
    assert [model["role"] for model in found["models"]] == ["start", "expert"]


@pytest.mark.parametrize(
    ("line", "types"),
    [("", "float32 and int64"), ("dtype: bfloat16", "bfloat16 and int64"), ("out_dtype: float16", "float16")],
)
def test_the_types_that_are_written_are_always_said(line: str, types: str, family: Path) -> None:
    shapes = {"a.weight": (8, 8), "b.ids": (3,)} if "int64" in types else {"a.weight": (8, 8)}
    for seed, name in enumerate(("three", "four")):
        write_checkpoint(family / name, seed, shapes=shapes, dtype=DType.F32, dtypes={"b.ids": DType.I64})
    text = "merge_method: linear\nmodels: [{model: three}, {model: four}]\nparameters: {weight: 1}\n"
    plan = planned(text + line)
    assert f"files: 1, {types}\n" in f"{plan.describe()}\n"
    assert plan.summary()["types"] == types.split(" and ")


@pytest.mark.parametrize(
    ("method", "parameter", "name"),
    [("sce", "select_topk: 0", "select_topk"), ("ties", "density: 0, weight: 1", "density")],
)
def test_keeping_nothing_is_noted(method: str, parameter: str, name: str, family: Path) -> None:
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: one}}, {{model: two}}]\n"
    note = f"{name} 0 keeps nothing, so the base stays as it is where it holds"
    assert note in planned(f"{text}parameters: {{{parameter}}}").notes
    assert note not in planned(f"{text}parameters: {{{parameter.replace('0', '0.5')}}}").notes


def test_a_wrong_t_is_one_problem(family: Path) -> None:
    text = "merge_method: nearswap\nbase_model: base\nmodels: [{model: one}]\nparameters: {t: ''}"
    with pytest.raises(ProblemList) as caught:
        planned(text)
    assert caught.value.problems == ("parameters.t: expected a number, found text ('')",)


@pytest.mark.parametrize("density", ["1.0e-300", "1.0e-320"])
def test_a_density_that_cannot_be_divided_by(density: str, family: Path) -> None:
    text = "merge_method: dare_linear\npreset: paper\nbase_model: base\nmodels: [{model: one}]"
    with pytest.raises(PymergeError, match=r"^density 1e-3.0 is too small: with this preset what is kept is"):
        planned(f"{text}\nparameters: {{density: {density}}}")


def test_a_base_that_is_a_model_too_says_so(family: Path) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: one, parameters: {weight: 1}}]"
    with pytest.raises(PymergeError, match=r"needs a weight for .*base; it is the base_model, and as"):
        planned(text)


def test_an_output_that_exists_has_a_remedy(family: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: one}]\nparameters: {weight: 1}\n"
    with pytest.raises(PymergeError, match=r"output .*two exists already; remove it, or give another name"):
        pymerge.plan(text, family / "two")
