"""Recipes: what is read, what is refused, and that refusals come together and name the culprit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pymerge.dtypes import DType
from pymerge.errors import ProblemList, PymergeError, RecipeError
from pymerge.parameters import Preset, cases_of, value_at
from pymerge.recipe import MAX_RECIPE_BYTES, Recipe, load_recipe, parse_recipe
from pymerge.rule import Scope, ThresholdTies

FULL = """
merge_method: ties
base_model: base   # a comment
models:
  - model: base
  - model: one
    parameters: {weight: 1, density: 0.5}
  - model: ./two
    parameters:
      weight: 1e-3
parameters:
  weight: -.5
  density: .9
  lambda: 2
  normalize: false
  rescale: true
  int8_mask: true
  scope: model
  threshold_ties: all
dtype: torch.float32
out_dtype: bfloat16
preset: mergekit
seed: 18446744073709551615
"""
SMALL = "merge_method: linear\nmodels: [{model: one, parameters: {weight: 1.0}}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path


def problems(text: str, folder: Path) -> tuple[str, ...]:
    with pytest.raises(PymergeError) as caught:
        parse_recipe(text, folder)
    error = caught.value
    return error.problems if isinstance(error, ProblemList) else (str(error),)


def with_top(line: str) -> str:
    return f"{SMALL}{line}\n"


def with_parameter(line: str) -> str:
    return f"{SMALL}parameters:\n  {line}\n"


def test_everything_a_recipe_can_say(folder: Path) -> None:
    recipe = parse_recipe(FULL, folder)
    assert recipe.method == "ties"
    assert recipe.base == folder / "base"
    assert [entry.path for entry in recipe.models] == [folder / "base", folder / "one", folder / "two"]
    assert [entry.parameters for entry in recipe.models] == [
        {},
        {"weight": 1.0, "density": 0.5},
        {"weight": 0.001},
    ]
    assert recipe.parameters == {
        "weight": -0.5,
        "density": 0.9,
        "lambda": 2.0,
        "normalize": False,
        "rescale": True,
        "scope": Scope.MODEL,
        "threshold_ties": ThresholdTies.ALL,
    }
    assert type(recipe.models[1].parameters["weight"]) is float
    assert (recipe.dtype, recipe.out_dtype) == (DType.F32, DType.BF16)
    assert (recipe.seed, recipe.preset, recipe.text) == (2**64 - 1, Preset.MERGEKIT, FULL)


def test_defaults(folder: Path) -> None:
    recipe = parse_recipe(SMALL, folder)
    assert (recipe.base, recipe.dtype, recipe.out_dtype, recipe.seed) == (None, None, None, 0)
    assert recipe.parameters == {}


def test_a_model_s_own_parameter_wins(folder: Path) -> None:
    recipe = parse_recipe(FULL, folder)
    scopes = [recipe.scopes(recipe.stack[0], entry) for entry in recipe.models]
    assert [value_at(cases_of(scope, "density"), "w", 0.0) for scope in scopes] == [0.9, 0.5, 0.9]
    assert value_at(cases_of(scopes[0], "no such"), "w", 0.0) is None


def test_nothing_after_parameters_means_none(folder: Path) -> None:
    text = "merge_method: ties\nmodels:\n  - model: one\n    parameters:\nparameters:\n"
    recipe = parse_recipe(text, folder)
    assert recipe.models[0].parameters == {}
    assert recipe.parameters == {}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2e+2", -200.0),
        (".5", 0.5),
        ("3", 3.0),
        ("0.25", 0.25),
        ("1.5e3", 1500.0),
    ],
)
def test_numbers_of_every_form(text: str, number: float, folder: Path) -> None:
    assert parse_recipe(with_parameter(f"lambda: {text}"), folder).parameters["lambda"] == number


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (with_top("slices: []"), "slices: expected a list with at least one entry, found a list ([])"),
        (with_top("modules: {}"), "modules: expected a mapping with at least one entry, found a mapping"),
        (with_top("name: [x]"), "name: expected text, found a list (['x'])"),
        (with_top("tokenizer: {}\ntokenizer_source: base"), "tokenizer and tokenizer_source exclude each"),
        (with_top("chat_template: 1"), "chat_template: expected text, found a number (1)"),
        (with_parameter("epsilon: x"), "parameters.epsilon: expected a number"),
        (with_top("base_model: one+lora"), "base_model (its LoRA): no such file or folder: "),
        (SMALL + "---\n" + SMALL, "the recipe has 2 YAML documents, expected one; pymerge.merge and"),
        (with_top("parametres: {}"), "parametres: unknown key 'parametres'; did you mean parameters?"),
        (with_top("weight: 1"), "weight: weight is a parameter; give it under parameters"),
        (with_top("xyzzy: 1"), "xyzzy: unknown key 'xyzzy'; known are merge_method, models, slices, para"),
        (with_parameter("densty: 1"), "parameters.densty: unknown key 'densty'; did you mean density?"),
        (with_parameter("lambda_: 1"), "parameters.lambda_: unknown key 'lambda_'; did you mean lambda?"),
        (
            "merge_method: ties\nmodels: [{model: one, parameters: {lambda: 1}}]",
            "models[0].parameters.lambda: lambda holds for all models; give it under the parameters of a",
        ),
        (
            "merge_method: ties\nmodels: [{model: one, wieght: 1}]",
            "models[0].wieght: unknown key 'wieght'; known are model, parameters",
        ),
        (with_parameter("weight: true"), "parameters.weight: expected a number, found a boolean (True)"),
        (with_parameter("weight: '1'"), "parameters.weight: expected a number, found text ('1')"),
        (with_parameter("weight: 1:30"), "parameters.weight: expected a number, found text ('1:30')"),
        (with_parameter("weight: 1:30.5"), "parameters.weight: expected a number, found text ('1:30.5')"),
        (with_parameter("weight: 2026-01-31"), "parameters.weight: expected a number, found text ('2026-01"),
        (with_top('base_model: "a\\0b"'), r"base_model: 'a\x00b' cannot be the name of a file"),
        (with_top('base_model: "\\udc80"'), r"base_model: '\udc80' cannot be the name of a file"),
        (with_top("base_model: ~nosuchuser/x"), "base_model: no such file or folder: "),
        (with_top("name: x") + "# \x07", "line 4: the character U+0007 is not allowed in YAML"),
        (with_parameter("weight: .nan"), "parameters.weight: nan is not finite"),
        (with_parameter("weight: .inf"), "parameters.weight: inf is not finite"),
        (with_parameter("weight: -.inf"), "parameters.weight: -inf is not finite"),
        (with_parameter("normalize: 1"), "parameters.normalize: expected true or false, found a number (1)"),
        (with_parameter("scope: modell"), "parameters.scope: 'modell' is not known; known are tensor, model"),
        (
            with_parameter("threshold_ties: last"),
            "parameters.threshold_ties: 'last' is not known; known are first, all",
        ),
        (
            with_top("preset: pefd"),
            "preset: 'pefd' is not known; known are mergekit, paper, peft, fusionbench",
        ),
        (with_top("seed: -1"), "seed: expected a whole number from 0 to 2**64 - 1, found a number (-1)"),
        (with_top("seed: 18446744073709551616"), "seed: expected a whole number from 0 to 2**64 - 1"),
        (
            with_top("tokenizer: {pad_to_multiple_of: 0}"),
            "tokenizer.pad_to_multiple_of: expected a whole number from 1 to 2**31 - 1, found a number (0)",
        ),
        (
            with_top("tokenizer: {tokens: {a: {source: {kind: model_token, model: one, token_id: -1}}}}"),
            "tokenizer.tokens.a.source.token_id: expected a whole number from 0 to 2**31 - 1, found a",
        ),
        (
            with_top("tokenizer: {tokens: {a: {source: {kind: model}}}}"),
            "tokenizer.tokens.a.source.kind: 'model' is not known; known are 'model_token' or 'zero'",
        ),
        (
            with_top("tokenizer: {tokens: {7: {source: one}}}"),
            "tokenizer.tokens: the key 7 is a number, expected text",
        ),
        (with_top("3: 4"), "the key 3 is a number, expected text"),
        (with_parameter("null: 4"), "parameters: the key None is nothing, expected text"),
        (with_top('"\\ud800": 4'), r"line 3: key '\ud800' is not valid Unicode"),
        (with_top('name: "\\ud800"'), "name: expected text in valid Unicode, found text ("),
        (
            with_top("gate_mode: hidden"),
            "gate_mode: gate_mode is a key of mergekit-moe, which builds",
        ),
        (with_top("seed: 1.5"), "seed: expected a whole number, found a number (1.5)"),
        (with_top("seed: true"), "seed: expected a whole number, found a boolean (True)"),
        (
            with_top("dtype: bf16"),
            "dtype: 'bf16' is not a type that merges; did you mean bfloat16?",
        ),
        (with_top("out_dtype: FP16"), "out_dtype: 'FP16' is not a type that merges; did you mean float16?"),
        (
            with_top("dtype: torch.fp32"),
            "dtype: 'torch.fp32' is not a type that merges; did you mean float32",
        ),
        (with_top("dtype: int64"), "dtype: 'int64' is not a type that merges"),
        (with_top("out_dtype: 16"), "out_dtype: '16' is not a type that merges"),
        (with_top("base_model: ''"), "base_model: expected text that is not empty, found text ('')"),
        (with_top("base_model: 3"), "base_model: expected text, found a number (3)"),
        ("merge_method: linear", "models: this key is required, or else slices or modules"),
        ("models: [{model: one}]", "merge_method: this key is required"),
        ("merge_method: linear\nmodels: []", "models: expected a list with at least one entry"),
        ("merge_method: linear\nmodels: one", "models: expected a list, found text ('one')"),
        ("merge_method: linear\nmodels: [one]", "models[0]: expected a mapping, found text ('one')"),
        ("merge_method: linear\nmodels: [{parameters: {}}]", "models[0].model: this key is required"),
        ("- a\n- b\n", "a recipe is a mapping with merge_method and models, not a list"),
        ("", "the recipe is empty"),
        ("seed: 1\nseed: 2\n", "line 2: key 'seed' is given twice"),
        ("models:\n - {model: a, model: b}\n", "line 2: key 'model' is given twice"),
        ("merge_method: [\n", "line 2: the recipe is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the recipe is not valid YAML"),
        ("&r\nmerge_method: ties\nmodels: [*r]", "the recipe cannot be read: RecursionError"),
        ("seed: 0x" + "f" * 6000, "the recipe cannot be read: ValueError"),
        ("seed: !!int ''", "the recipe is not valid YAML: IndexError"),
        ("normalize: !!bool foo", "the recipe is not valid YAML: KeyError"),
        ("weight: !!timestamp foo", "the recipe is not valid YAML: AttributeError"),
    ],
)
def test_refused_with_one_sentence(text: str, start: str, folder: Path) -> None:
    found = problems(text, folder)
    assert len(found) == 1
    assert found[0].startswith(start)
    assert "\n" not in found[0]


def test_all_problems_come_together(folder: Path) -> None:
    text = """
slices: []
models: [{model: one, parameters: {wight: 1, density: yes}}]
parameters: {lambda: .nan}
dtype: int8
"""
    assert len(problems(text, folder)) == 6


def test_models_that_are_missing_are_named_beside_slices_that_are_wrong(folder: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources: [{model: one, layer_range: [2, 1]}, {model: nowhere, layer_range: [0, 1]}]
base_model: neither
tokenizer: {source: union}
tokenizer_source: union
"""
    found = problems(text, folder)
    assert [sentence.partition(": ")[0] for sentence in found] == [
        "slices[0].sources[0].layer_range",
        "tokenizer and tokenizer_source exclude each other; give one",
        "slices[0].sources[1].model",
        "base_model",
    ]


def test_missing_models_name_where_they_were_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    text = "merge_method: ties\nbase_model: ./no/name\nmodels: [{model: nowhere}, {model: one}]"
    assert problems(text, folder) == (
        f"models[0].model: no such file or folder: {folder}/nowhere or {folder}/elsewhere/nowhere",
        f"base_model: no such file or folder: {folder}/no/name or {folder}/elsewhere/no/name",
    )


def test_relative_paths_start_at_the_recipe_then_at_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = folder / "work"
    (work / "one").mkdir(parents=True)
    (work / "three").mkdir()
    monkeypatch.chdir(work)
    (folder / "recipe.yml").write_text("merge_method: linear\nmodels: [{model: one}, {model: three}]")
    recipe = load_recipe(folder / "recipe.yml")
    assert recipe == load_recipe(str(folder / "recipe.yml")), "a path may be a str, as everywhere"
    assert [entry.path for entry in recipe.models] == [folder / "one", work / "three"]


def test_a_folder_name_may_hold_the_two_signs(folder: Path) -> None:
    (folder / "a+b@c").mkdir()
    recipe = parse_recipe("merge_method: linear\nmodels: [{model: a+b@c}]", folder)
    assert recipe.models[0].path == folder / "a+b@c"


def test_a_model_listed_twice(folder: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: one}, {model: ./one}]"
    assert problems(text, folder) == (f"models[1].model: {folder}/one is already listed as models[0]",)


def test_anchors_and_merge_keys(folder: Path) -> None:
    text = """
merge_method: linear
models:
  - model: one
    parameters: &same {weight: 2}
  - model: two
    parameters: {<<: *same, density: 1}
"""
    assert parse_recipe(text, folder).models[1].parameters == {"weight": 2.0, "density": 1.0}


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: *a}", "[" * 100_000, "a: 1_000_000" + "0" * 5000])
def test_hostile_text_is_a_recipe_error(text: str, folder: Path) -> None:
    assert problems(text, folder)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yml: the file does not exist"):
        load_recipe(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_bytes(b"merge_method: \xff")
    with pytest.raises(RecipeError, match=r"bad\.yml is not UTF-8 text \(byte 14\)"):
        load_recipe(tmp_path / "bad.yml")
    (tmp_path / "big.yml").write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(RecipeError, match="allowed are at most 1,000,000"):
        load_recipe(tmp_path / "big.yml")


def test_a_recipe_cannot_be_changed(folder: Path) -> None:
    recipe: Recipe = parse_recipe(SMALL, folder)
    with pytest.raises(AttributeError):
        recipe.seed = 1  # type: ignore[misc]
