"""The whole grammar of recipes: values that vary, slices, modules, names of models, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made import write_checkpoint

from pymerge.errors import ProblemList, PymergeError, RecipeError
from pymerge.parameters import EVERY, Case, Conditional, Gradient, cases_of, value_at
from pymerge.recipe import Recipe, parse_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "one", "two", "three"):
        (tmp_path / name).mkdir()
    return tmp_path


def problems(text: str, folder: Path) -> tuple[str, ...]:
    with pytest.raises(PymergeError) as caught:
        parse_recipe(text, folder)
    error = caught.value
    return error.problems if isinstance(error, ProblemList) else (str(error),)


def with_weight(value: str, folder: Path) -> object:
    text = f"merge_method: linear\nmodels: [{{model: one}}]\nparameters:\n  weight: {value}\n"
    return parse_recipe(text, folder).parameters["weight"]


# -- values that vary ---------------------------------------------------------------------------------------


def test_the_forms_of_a_value(folder: Path) -> None:
    assert with_weight("[0, 0.5, 1]", folder) == Gradient((0.0, 0.5, 1.0))
    assert with_weight("{filter: mlp, value: 1}", folder) == Conditional((Case("mlp", 1.0),))
    assert with_weight("[{filter: mlp, value: [1, 2]}, {value: 3}]", folder) == Conditional(
        (Case("mlp", Gradient((1.0, 2.0))), Case(EVERY, 3.0))
    )
    for everything in ("'*'", "''", "null"):
        assert with_weight(f"[{{filter: {everything}, value: 1}}]", folder) == Conditional((Case("*", 1.0),))


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((2.0,), 0.7, 2.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0, 0.0), 0.75, 0.5),
        ((1.0, 3.0, 7.0), 1.0, 7.0),
        ((1.0, 3.0, 7.0), 0.0, 1.0),
        ((True, False, False), 0.49, True),
        ((True, False, True), 1.0, True),
        ((True, False), 0.999, True),
    ],
)
def test_gradients(values: tuple[float, ...], t: float, expected: float) -> None:
    assert Gradient(values).at(t) == expected


def test_the_first_case_that_takes_a_tensor_counts_and_else_the_next_scope() -> None:
    scopes = (
        {"weight": Conditional((Case("q_proj", 1.0), Case("layers.1.", Gradient((2.0, 4.0)))))},
        {"density": 0.5},
        {"weight": Conditional((Case("mlp", 5.0),))},
        {"weight": 6.0},
        {"weight": 7.0},
    )
    cases = cases_of(scopes, "weight")
    for name, expected in {
        "layers.1.q_proj": 1.0,
        "layers.1.mlp": 3.0,
        "layers.11.mlp": 5.0,
        "norm": 6.0,
    }.items():
        assert value_at(cases, name, 0.5) == expected
    assert value_at(cases_of(scopes, "gamma"), "norm", 0.5) is None
    assert value_at(cases_of(scopes[:1], "weight"), "norm", 0.5) is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[]", "parameters.weight: expected a list with at least one entry, found a list ([])"),
        ("[1, x]", "parameters.weight[1]: expected a number, found text ('x')"),
        ("[1, .nan]", "parameters.weight[1]: nan is not finite"),
        ("[[1]]", "parameters.weight[0]: expected a number, found a list ([1])"),
        ("[1, {value: 2}]", "parameters.weight[0]: expected a mapping, found a number (1)"),
        ("{filter: a}", "parameters.weight.value: this key is required"),
        ("[{filter: 1, value: 2}]", "parameters.weight[0].filter: expected text, found a number (1)"),
        (
            "[{fliter: a, value: 2}]",
            "parameters.weight[0].fliter: unknown key 'fliter'; did you mean filter?",
        ),
        ("[{value: [1, true]}]", "parameters.weight[0].value[1]: expected a number, found a boolean (True)"),
        ("[{value: {value: 1}}]", "parameters.weight[0].value: expected a number, found a mapping"),
    ],
)
def test_wrong_values_are_refused_where_they_stand(value: str, sentence: str, folder: Path) -> None:
    text = f"merge_method: linear\nmodels: [{{model: one}}]\nparameters:\n  weight: {value}\n"
    found = problems(text, folder)
    assert len(found) == 1
    assert found[0].startswith(sentence)


# -- slices and modules -------------------------------------------------------------------------------------

SLICES = """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: one, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: base, layer_range: [0, 2]}
    parameters: {lambda: [1, 2]}
  - base_model: three
    residual_weight: 1
    sources: [{model: two, layer_range: [1, 2]}, {model: three, layer_range: [1, 2]}]
parameters: {weight: 1}
"""


def test_slices(folder: Path) -> None:
    recipe = parse_recipe(SLICES, folder)
    first, second = recipe.stack
    assert recipe.slices == recipe.stack
    assert [(entry.path.name, entry.layers) for entry in first.sources] == [
        ("one", range(2)),
        ("base", range(2)),
    ]
    assert (first.base, second.base) == (folder / "base", folder / "three")
    assert first.parameters == {"lambda": Gradient((1.0, 2.0))}
    assert recipe.notes == ("slices[1]: residual_weight has no effect",)
    assert [path.name for path in recipe.paths] == ["base", "three", "one", "two"]
    assert recipe.scopes(first, first.sources[0]) == (
        {"weight": 0.5},
        first.parameters,
        {},
        {"weight": 1.0},
    )


def test_a_single_module_stands_between_slices_and_recipe(folder: Path) -> None:
    text = """
merge_method: linear
modules:
  text:
    models: [{model: one, parameters: {weight: 3}}, {model: two}]
    parameters: {weight: 2}
parameters: {weight: 1}
"""
    recipe: Recipe = parse_recipe(text, folder)
    assert recipe.scopes(recipe.stack[0], recipe.models[0]) == (
        {"weight": 3.0},
        {},
        {"weight": 2.0},
        {"weight": 1.0},
    )
    sliced = text.replace("models: [{model: one,", "slices: [{sources: [{model: one, layer_range: [0, 1],")
    sliced = sliced.replace("{model: two}]", "{model: two, layer_range: [0, 1]}]}]")
    assert len(parse_recipe(sliced, folder).slices[0].sources) == 2


ONE_SLICE = "merge_method: linear\nslices: [{{sources: [{{model: one, layer_range: {}}}]}}]"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            ONE_SLICE.format("[2, 2]"),
            ["slices[0].sources[0].layer_range: expected two layer numbers [first,"],
        ),
        (
            ONE_SLICE.format("[-1, 2]"),
            ["slices[0].sources[0].layer_range: expected two layer numbers [first,"],
        ),
        (
            ONE_SLICE.format("4"),
            ["slices[0].sources[0].layer_range: expected two layer numbers [first, last"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: one}]}]",
            ["slices[0].sources[0].layer_range: this key is required"],
        ),
        (
            "merge_method: linear\nslices: [{sources: []}]",
            ["slices[0].sources: expected a list with at least one"],
        ),
        (
            "merge_method: linear\nslices: [{source: []}]",
            [
                "slices[0].sources: this key is required",
                "slices[0].source: unknown key 'source'; did you mean",
            ],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: one, layer_range: [0, 1]}],"
            " parameters: {scope: model}}]",
            ["slices[0].parameters.scope: scope holds for all models; give it under the parameters of the"],
        ),
        (
            "merge_method: linear\nmodels: [{model: one}]\n"
            "slices: [{sources: [{model: one, layer_range: [0, 1]}]}]",
            ["models and slices exclude each other; give one"],
        ),
        (
            "merge_method: linear\nmodules: {a: {}}",
            ["modules.a.models: this key is required, or else slices"],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: one, layer_range: [0, 1]},"
            " {model: ./one, layer_range: [1, 2]}]}]",
            ["slices[0].sources[1].model: "],
        ),
    ],
)
def test_slices_that_are_refused(text: str, sentences: list[str], folder: Path) -> None:
    found = problems(text, folder)
    assert len(found) == len(sentences)
    for sentence, start in zip(found, sentences, strict=True):
        assert sentence.startswith(start)


# -- names of models ----------------------------------------------------------------------------------------


def one_model(reference: str, folder: Path) -> Recipe:
    return parse_recipe(f"merge_method: linear\nmodels: [{{model: {reference}}}]", folder)


@pytest.mark.parametrize(
    "reference",
    ["one", "{model: one}", "{model: {path: one}}", "{model: {path: one, revision: null}, lora: null}"],
)
def test_a_model_may_be_a_mapping(reference: str, folder: Path) -> None:
    recipe = one_model(reference, folder)
    assert recipe.models[0].path == folder / "one"
    assert recipe.notes == ()


def test_what_a_name_says_in_vain_is_noted(folder: Path) -> None:
    assert one_model("one@main", folder).notes == (
        f"models[0].model: the revision main has no effect: {folder}/one is a local path",
    )
    assert one_model("{model: {path: one, revision: v1}, override_architecture: X}", folder).notes == (
        "models[0].model: override_architecture has no effect: tensors go by their names",
        f"models[0].model: the revision v1 has no effect: {folder}/one is a local path",
    )


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("one+four", "models[0].model (its LoRA): no such file or folder: "),
        ("one@a+four@b", "models[0].model (its LoRA): no such file or folder: "),
        ("{model: one, lora: 3}", "models[0].model.lora: expected text, found a number (3)"),
        ("{model: {path: one}, lora: {pth: two}}", "models[0].model.lora.path: this key is required"),
        ("{path: one}", "models[0].model.model: this key is required"),
        ("{model: {pth: one}}", "models[0].model.model.path: this key is required"),
        ("{model: {path: 3}}", "models[0].model.model.path: expected text, found a number (3)"),
        ("{model: one, revison: x}", "models[0].model.revison: unknown key 'revison'; known are model, lora"),
        ("{model: {path: one, revison: x}}", "models[0].model.model.revison: unknown key 'revison'; did you"),
    ],
)
def test_names_that_are_refused(reference: str, sentence: str, folder: Path) -> None:
    assert any(
        found.startswith(sentence)
        for found in problems(f"merge_method: linear\nmodels: [{{model: {reference}}}]", folder)
    )


class Hub(ModuleType):
    """In place of huggingface_hub: what was asked for, and one folder for all names but org/none."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(self, name: str, *, revision: str | None, **patterns: list[str]) -> str:
        assert "*.safetensors" in patterns["allow_patterns"]
        self.asked.append((name, revision))
        if name == "org/none":
            raise OSError("404 Client Error.\n\nRepository Not Found for url: x.")
        return str(self.folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(folder / "three")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_hub_names_are_looked_up(folder: Path, hub: Hub) -> None:
    assert one_model("org/name", folder).models[0].path == folder / "three"
    assert one_model("org/name@v2", folder).models[0].path == folder / "three"
    assert one_model("{model: {path: org/name, revision: v3}}", folder).models[0].path == folder / "three"
    assert hub.asked == [("org/name", None), ("org/name", "v2"), ("org/name", "v3")]
    (folder / "org" / "name").mkdir(parents=True)
    assert one_model("org/name", folder).models[0].path == folder / "org" / "name"
    assert len(hub.asked) == 3


def test_a_hub_name_that_is_not_found(folder: Path, hub: Hub) -> None:
    text = "merge_method: linear\nmodels: [{model: org/none}]"
    assert problems(text, folder) == (
        f"models[0].model: no such file or folder: {folder}/org/none or {Path.cwd()}/org/none; org/none"
        " cannot be had from the Hugging Face hub: 404 Client Error",
    )


@pytest.mark.parametrize("reference", ["org/name", "org/name@v1"])
def test_the_cache_is_enough_where_the_hub_is_switched_off(reference: str, tmp_path: Path) -> None:
    """With the library itself; another process, because it reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "cache" / "models--org--name"
    write_checkpoint(repository / "snapshots" / "0123456789", 1)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text("0123456789")
    model = f"{{model: {reference}, parameters: {{weight: 1}}}}"
    recipe = f"merge_method: linear\nmodels: [{model}, {{model: org/other, parameters: {{weight: 1}}}}]"
    (tmp_path / "two.yml").write_text(recipe)
    (tmp_path / "one.yml").write_text(recipe.replace(", {model: org/other, parameters: {weight: 1}}", ""))
    settings = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = [
        subprocess.run(
            [sys.executable, "-m", "pymerge", "plan", f"{name}.yml"],
            cwd=tmp_path,
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        for name in ("one", "two")
    ]
    assert f"{repository}/snapshots/0123456789 (weight 1)" in done[0].stdout
    assert done[1].stderr == (
        f"pymerge: models[1].model: no such file or folder: {tmp_path}/org/other; org/other"
        " cannot be had from the Hugging Face hub: it is not in the cache, and the hub is switched"
        " off or out of reach\n"
    )


def test_nothing_is_downloaded_for_a_recipe_with_problems(folder: Path, hub: Hub) -> None:
    text = "merge_method: linear\nmodels: [{model: org/name}, {model: nowhere}]"
    assert len(problems(text, folder)) == 1
    assert hub.asked == []


def test_without_the_library_the_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = "merge_method: linear\nmodels: [{model: org/name}]"
    assert (
        "; org/name may be a name on the Hugging Face hub; install huggingface_hub"
        in problems(text, folder)[0]
    )


def test_a_recipe_is_one_document_and_its_name_has_no_effect(folder: Path) -> None:
    text = "name: mine\nmerge_method: linear\nmodels: [{model: one}]\n"
    with pytest.raises(RecipeError, match="has 2 YAML documents, expected one"):
        parse_recipe(f"{text}---\n{text}", folder)
    for around in (text, f"---\n{text}", f"{text}---\n", f"{text}...\n---\n# nothing\n"):
        recipe = parse_recipe(around, folder)
        assert recipe.notes == ("name 'mine' has no effect: this merge is the output",)
        assert recipe.text == around
