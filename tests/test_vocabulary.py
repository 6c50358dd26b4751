"""Vocabularies that differ: every row of the merge comes from where the rules say, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import read_checkpoint, weight_digests, write_lora, write_recipe
from torch import Tensor
from vocabularies import EMBEDDING, HEAD, WIDTH, Model, expected_input, tokenizer_json, write_model

import pymerge
from pymerge.backends import reference
from pymerge.errors import ProblemList, PymergeError

BASE = ("a", "b", "c", "d", "e", "f", "g", "h", "<s>", "</s>")
ONE = ("h", "g", "f", "e", "d", "c", "b", "a", "x", "y", "<s>", "</s>", "<im>")
TWO = ("a", "b", "c", "d", "x", "z", "<s>", "<im>", "<two>")
SPECIAL = ("<s>", "</s>", "<im>", "<two>")
UNION = (*BASE, "x", "y", "z", "<im>", "<two>")


def family(folder: Path, dtype: torch.dtype = torch.float32) -> list[Model]:
    return [
        write_model(folder / "base", BASE, 1, dtype=dtype, special=SPECIAL),
        write_model(folder / "one", ONE, 2, dtype=dtype, special=SPECIAL),
        write_model(folder / "two", TWO, 3, dtype=dtype, special=SPECIAL, padding=5),
    ]


def merged(
    folder: Path, method: str, models: Sequence[Model], base: Model | None, tokenizer: Any, **more: Any
) -> Path:
    options = {key: more.pop(key) for key in ("threads", "max_memory") if key in more}
    recipe = write_recipe(
        folder / "recipe.yml",
        method,
        [model.path for model in models],
        base.path if base else None,
        tokenizer=tokenizer,
        **more,
    )
    out = folder / f"out{len(list(folder.glob('out*')))}"
    planned = pymerge.plan(recipe, out)
    summary = pymerge.merge(recipe, out, **options)
    if method in ("linear", "task_arithmetic"):  # which read once, so that the plan knows how many bytes
        assert summary.bytes_read == planned.bytes_read
    return out


def from_reference(
    recipe: Path, base: Tensor | None, experts: Sequence[Tensor], name: str, out: torch.dtype
) -> Tensor:
    plan = pymerge.plan(recipe)
    job = next(job for shard in plan.jobs for job in shard if job.name == name)
    assert job.rule is not None
    bases = None if base is None else [base]
    return reference.merge_group([name], bases, [list(experts)], job.rule, [out], None)[0]


def ids_of(folder: Path) -> dict[str, int]:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = data["model"]["vocab"]
    return vocab | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("source", "tokens"), [("union", UNION), ("base", BASE), ("one", ONE)])
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_row(
    tmp_path: Path, dtype: torch.dtype, source: str, tokens: Sequence[str], multiple: int
) -> None:
    models = family(tmp_path, dtype)
    given = {"source": source, "pad_to_multiple_of": multiple}
    padding = -len(tokens) % multiple
    for method, base in (("linear", models[0]), ("ties", models[0]), ("linear", None)):
        experts = models[1:] if method == "ties" else models
        each = [{"weight": 0.25 + 0.5 * k, "density": 0.5} for k in range(len(experts))]
        out = merged(tmp_path, method, experts, base, given, each=each)
        found = read_checkpoint(out)
        assert ids_of(out) == {token: number for number, token in enumerate(tokens)}
        assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokens) + padding
        for name in (EMBEDDING, HEAD):
            rows = [expected_input(models, base, own, name, tokens, padding) for own in models]
            task_base = rows[0] if method == "ties" else None
            inputs = rows[1:] if method == "ties" else rows
            expected = from_reference(tmp_path / "recipe.yml", task_base, inputs, name, dtype)
            assert torch.equal(found[name], expected.reshape(found[name].shape)), (method, name)


def test_without_a_base_the_mean_of_those_that_have_a_token(tmp_path: Path) -> None:
    models = family(tmp_path)
    out = merged(
        tmp_path, "linear", models, None, {"source": "union"}, each=[{"weight": w} for w in (0, 0, 1)]
    )
    row = read_checkpoint(out)[EMBEDDING][BASE.index("h")]
    held = [models[0].row(EMBEDDING, "h"), models[1].row(EMBEDDING, "h")]
    assert held[0] is not None
    assert held[1] is not None
    assert torch.equal(row, (held[0] + held[1]) / 2)


@pytest.mark.parametrize(
    ("token", "rule", "donor"),
    [
        ("h", {"source": {"kind": "zero"}}, None),
        ("h", {"source": "one"}, ("one", "h")),
        ("x", {"source": {"kind": "model_token", "model": "one", "token": "a"}}, ("one", "a")),
        ("x", {"source": {"kind": "model_token", "model": "two", "token_id": 11}}, ("two", 11)),
        ("<new>", {"source": {"kind": "model_token", "model": "base", "token": "a"}}, ("base", "a")),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_token_with_a_rule(
    tmp_path: Path, token: str, rule: Mapping[str, Any], donor: tuple[str, str | int] | None, force: bool
) -> None:
    models = family(tmp_path)
    given = {"source": "union", "tokens": {token: {**rule, "force": force}}}
    row = torch.zeros(WIDTH)
    if donor:
        model = next(model for model in models if model.path.name == donor[0])
        row = model.rows(EMBEDDING)[donor[1] if isinstance(donor[1], int) else model.tokens.index(donor[1])]
    tokens = UNION if token in UNION else (*UNION, token)
    for number, own in enumerate(models):
        each = [{"weight": float(number == k)} for k in range(3)]
        out = merged(tmp_path, "linear", models, models[0], given, each=each)
        rows = expected_input(
            models, models[0], own, EMBEDDING, tokens, rules={token: row}, forced=[token] if force else ()
        )
        assert torch.equal(read_checkpoint(out)[EMBEDDING], rows)
        assert ids_of(out)[token] == tokens.index(token)


def test_a_donor_of_another_type_is_rounded_once(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", BASE, 1, dtype=torch.float32)
    one = write_model(tmp_path / "one", BASE[:4], 2, dtype=torch.bfloat16)
    out = merged(
        tmp_path, "linear", [base, one], base, {"source": "base"}, each=[{"weight": 0.0}, {"weight": 1.0}]
    )
    expected = expected_input([base, one], base, one, EMBEDDING, BASE)
    assert expected.dtype is torch.bfloat16
    assert torch.equal(read_checkpoint(out)[EMBEDDING], expected.float())


@pytest.mark.parametrize("which", ["base", "one"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, which: str) -> None:
    base = write_model(tmp_path / "base", BASE, 1, tied=which == "base")
    one = write_model(tmp_path / "one", ONE, 2, tied=which == "one")
    out = merged(tmp_path, "linear", [base, one], base, {"source": "union"})
    tokens = (*BASE, "x", "y", "<im>")
    rows = [expected_input([base, one], base, own, HEAD, tokens) for own in (base, one)]
    assert torch.equal(read_checkpoint(out)[HEAD], (rows[0] + rows[1]) / 2)
    notes = pymerge.plan(tmp_path / "recipe.yml").notes
    assert any("its config ties the two" in note for note in notes)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_same_bits_for_any_tile_and_threads(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    tokens = [f"t{n}" for n in range(3000)]
    base = write_model(tmp_path / "base", tokens, 1)
    order = torch.randperm(3000, generator=g).tolist()
    one = write_model(tmp_path / "one", [*(tokens[n] for n in order[:2500]), "new"], 2)
    digests = set()
    for threads, memory in ((1, None), (2, None), (2, "3MB")):
        options = {"threads": threads} | ({"max_memory": memory} if memory else {})
        each = [{"weight": 1.0, "density": 0.3}]
        out = merged(tmp_path, "ties", [one], base, {"source": "union"}, each=each, **options)
        digests.add(str(weight_digests(out)))
    assert len(digests) == 1


def test_the_plan_says_what_is_missing_where(tmp_path: Path) -> None:
    models = family(tmp_path)
    paths = [model.path for model in models]
    recipe = write_recipe(tmp_path / "r.yml", "linear", paths, paths[0], tokenizer_source="union")
    said = pymerge.plan(recipe).describe()
    assert f"tokenizer    {paths[0]} and the tokens that only others have: 15 tokens, 15 rows" in said
    assert f"5 of them are missing in expert {paths[0]}" in said
    assert f"6 of them are missing in expert {paths[2]}" in said


def test_nothing_is_asked_for_and_vocabularies_differ(tmp_path: Path) -> None:
    paths = [model.path for model in family(tmp_path)]
    recipe = write_recipe(tmp_path / "r.yml", "linear", paths)
    with pytest.raises(PymergeError, match=r"tensor 'model\.embed_tokens\.weight' has shape"):
        pymerge.plan(recipe)


@pytest.mark.parametrize(
    ("tokenizer", "sentence"),
    [
        ({"source": "nowhere"}, "tokenizer.source: no such file or folder"),
        ({"sauce": "union"}, "tokenizer.sauce: unknown key 'sauce'; did you mean source?"),
        ({"tokens": {"x": {"sauce": "one"}}}, "unknown key 'sauce'; did you mean source?"),
        ({"pad_to_multiple_of": 0}, "tokenizer.pad_to_multiple_of"),
        ({"tokens": {"x": {"source": "base"}}}, "tokenizer.tokens.x: {folder}/base has no token 'x'"),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "one", "token_id": 99}}}},
            "tokenizer.tokens.x: {folder}/one has no row 99, it has 13",
        ),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "one"}}}},
            "kind model_token takes a model and one of token and token_id",
        ),
        ({"tokens": {"x": {"source": {"kind": "zero", "token": "a"}}}}, "kind zero takes no token"),
        ({"tokens": {"x": {"source": "far"}}}, "{folder}/far is not among the models that are merged"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, tokenizer: Any, sentence: str) -> None:
    paths = [model.path for model in family(tmp_path)]
    (tmp_path / "far").mkdir()
    recipe = write_recipe(tmp_path / "r.yml", "linear", paths, paths[0], tokenizer=tokenizer)
    with pytest.raises(PymergeError) as caught:
        pymerge.plan(recipe)
    assert sentence.format(folder=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "the file does not exist, so nobody knows which row is which token"),
        ("[]", "the JSON is not an object"),
        ("{}", "the tokenizer has no vocabulary under model"),
        ('{"model": {"vocab": {"a": -1}}}', "token 'a' has the id -1"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [1]}', "added_tokens is no list of mappings"),
        ('{"model": {"vocab": {"a": 0, "b": 3, "c": 3}}}', "tokens 'b' and 'c' both have the id 3"),
        (
            '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9000000, "content": "x"}]}',
            "token 'x' has the id 9,000,000, far past the 2 tokens that there are",
        ),
        ('{"model": {"vocab": [[["a"], 0.0]]}}', "the vocabulary is no list of texts and scores"),
        (
            '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": ["x"]}]}',
            "added_tokens has an entry whose content is no text",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read(tmp_path: Path, text: str | None, sentence: str) -> None:
    paths = [model.path for model in family(tmp_path)]
    file = paths[1] / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    recipe = write_recipe(tmp_path / "r.yml", "linear", paths, paths[0], tokenizer_source="union")
    with pytest.raises(PymergeError) as caught:
        pymerge.plan(recipe)
    assert f"{file}: {sentence}" in str(caught.value)
    assert "shape" not in str(caught.value)  # which differ only until there is one tokenizer for all


def test_the_tokenizer_of_a_model_with_a_lora(tmp_path: Path) -> None:
    models = family(tmp_path)
    lora, _ = write_lora(tmp_path / "lora", {}, 1)
    both = Path(f"{models[1].path}+{lora}")
    paths = [models[0].path, both, models[2].path]
    recipe = write_recipe(tmp_path / "r.yml", "linear", paths, tokenizer_source=str(both))
    pymerge.merge(recipe, tmp_path / "out")
    assert ids_of(tmp_path / "out") == {token: number for number, token in enumerate(ONE)}
    assert read_checkpoint(tmp_path / "out")[EMBEDDING].shape == (len(ONE), WIDTH)


def test_all_that_is_wrong_with_tokenizers_is_said_together(tmp_path: Path) -> None:
    """Whatever else is wrong; but nothing that only follows from it."""
    paths = [model.path for model in family(tmp_path)]
    for path in paths[:2]:
        (path / "tokenizer.json").write_text("[]")
    (paths[2] / "config.json").write_text("{")
    more = [*paths, tmp_path / "nowhere"]
    recipe = write_recipe(tmp_path / "r.yml", "linear", more, paths[0], tokenizer_source="union", sauce=1)
    with pytest.raises(ProblemList) as caught:
        pymerge.plan(recipe, tmp_path)
    said = [text.replace(str(tmp_path), "") for text in caught.value.problems]
    assert [text for text in said if text.startswith("tokenizer: ")] == [
        "tokenizer: /base/tokenizer.json: the JSON is not an object",
        "tokenizer: /one/tokenizer.json: the JSON is not an object",
    ]
    for what in ("sauce: unknown key", "no such file or folder: /nowhere", "/two/config.json: ", "output "):
        assert any(what in text for text in said), what
    assert not any("shape" in text for text in said)


def test_rows_that_are_no_tokens_are_said_to_be(tmp_path: Path) -> None:
    model = write_model(tmp_path / "gaps", BASE, 1)
    tokenizer = tokenizer_json(BASE)
    tokenizer["added_tokens"] = [{"id": len(BASE) + 2, "content": "<new>"}]
    (model.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write_recipe(tmp_path / "r.yml", "passthrough", [model.path], tokenizer_source="union")
    said = pymerge.plan(recipe).describe()
    assert "11 tokens, 13 rows" in said
    assert "1 of them are missing in expert" in said
    assert "2 rows are no token's and get zeros" in said
    assert "None" not in said


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models = family(tmp_path)
    out = merged(tmp_path, "linear", models, models[0], {"source": "union"})
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(UNION)}
    assert tokenizer("h x <im> z")["input_ids"] == [UNION.index(token) for token in ("h", "x", "<im>", "z")]
