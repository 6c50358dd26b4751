"""Recipes of several YAML documents: planned together, merged in order, continued where they were left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made import recipe_text, write_checkpoint

import pymerge
from pymerge.cli import main
from pymerge.errors import ProblemList, PymergeError
from pymerge.plan_chain import Stage


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two", "three")):
        write_checkpoint(tmp_path / name, seed, shards=1 + seed, config={"model_type": name})
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path


def document(name: str | None, models: list[str], base: str | None = None, method: str = "linear") -> str:
    called = "" if name is None else f"name: {name}\n"
    listed = "".join(f"- {{model: {model}, parameters: {{weight: 0.5}}}}\n" for model in models)
    origin = "" if base is None else f"base_model: {base}\n"
    return f"{called}merge_method: {method}\n{origin}models:\n{listed}"


CHAIN = (
    document("first", ["one", "two"], "base", "ties"),
    document("second", ["first", "three"]),
    document(None, ["second", "first"], "base", "task_arithmetic"),
)


def written(folder: Path, *documents: str) -> Path:
    (folder / "recipe.yml").write_text("---\n".join(documents))
    return folder / "recipe.yml"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def problems(folder: Path, *documents: str) -> list[str]:
    with pytest.raises(PymergeError) as caught:
        pymerge.merge(written(folder, *documents), folder / "out")
    error = caught.value
    assert not {path.name for path in folder.iterdir()} & {"out", "out.parts", "out.partial"}
    return list(error.problems) if isinstance(error, ProblemList) else [str(error)]


def test_the_chain_gives_what_single_recipes_give(family: Path) -> None:
    summary = pymerge.merge(written(family, *CHAIN), family / "out", intermediate_dir=family / "between")
    for name, text in (
        ("a", recipe_text("ties", ["one", "two"], "base", weight=0.5)),
        ("b", recipe_text("linear", ["a", "three"], None, weight=0.5)),
        ("c", recipe_text("task_arithmetic", ["b", "a"], "base", weight=0.5)),
    ):
        (family / f"{name}.yml").write_text(text)
        pymerge.merge(family / f"{name}.yml", family / name)
    assert summary.out == str(family / "out")
    for name, folder in (("a", "between/first"), ("b", "between/second"), ("c", "out")):
        assert weights(family / folder) == weights(family / name)
        assert call("verify", family / folder).exit_code == 0
    assert json.loads((family / "out" / "config.json").read_text())["model_type"] == "base"
    # Each output tells of its own document only.
    assert (family / "between/first/mergekit_config.yml").read_text() == CHAIN[0]
    assert (family / "out/mergekit_config.yml").read_text() == "---\n" + CHAIN[2]


def test_an_interrupted_run_keeps_what_is_finished(family: Path) -> None:
    recipe = written(family, *CHAIN)
    assert call("merge", recipe, family / "out").exit_code == 0
    wanted = weights(family / "out")
    kept = os.stat(family / "out.parts/first/model.safetensors").st_ino
    for path in (family / "out", family / "out.parts" / "second"):
        path.rename(path.with_name(path.name + "-moved"))
    again = call("merge", recipe, family / "out")
    assert again.exit_code == 0, again.output
    assert f"{family}/out.parts/first: merged before, kept" in again.stdout
    assert f"{family}/out.parts/second: 5 tensors of 2 experts merged by linear" in again.stdout
    assert os.stat(family / "out.parts/first/model.safetensors").st_ino == kept
    assert weights(family / "out") == wanted
    (family / "out").rename(family / "out-once-more")
    found = json.loads(call("merge", recipe, family / "out", "--json").stdout)
    assert [part["name"] for part in found["intermediates"]] == ["first", "second"]
    assert "tensors" not in found["intermediates"][0]
    assert found["out"] == str(family / "out")


def test_a_finished_merge_of_something_else_is_refused(family: Path) -> None:
    recipe = written(family, *CHAIN)
    assert call("merge", recipe, family / "out").exit_code == 0
    (family / "out").rename(family / "kept")
    changed = (CHAIN[0].replace("0.5", "0.25"), *CHAIN[1:])
    result = call("merge", written(family, *changed), family / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"pymerge: document 1 (first): {family}/out.parts/first is the merge of another plan (recipe line 5:"
    )
    assert "remove it to have it merged anew" in result.stderr
    weight = family / "out.parts" / "first" / "model.safetensors"
    weight.write_bytes(weight.read_bytes() + b"x")
    result = call("merge", written(family, *CHAIN), family / "out")
    assert f"{family}/out.parts/first was changed after it was merged" in result.stderr
    (family / "out.parts" / "first").rename(family / "elsewhere")
    result = call("merge", recipe, family / "out")
    assert (
        f"document 2 (second): {family}/out.parts/second exists already, but 'first', of which it is made, is"
        " yet to be merged; remove it" in result.stderr
    )
    assert not (family / "out").exists()


def test_plans_of_merges_that_are_to_come(family: Path) -> None:
    recipe = written(family, *CHAIN)
    shown = call("plan", recipe, family / "out")
    assert shown.exit_code == 0, shown.output
    parts = shown.stdout.split("\n\n")
    assert [part.splitlines()[0] for part in parts] == [
        "document     first",
        "document     second",
        "document     the output",
    ]
    assert "not merged" not in parts[0]
    assert f"not merged   {family}/out.parts/first: planned from the headers that are to come" in parts[1]
    assert f"expert       {family}/out.parts/second (weight 0.5)" in parts[2]
    assert not (family / "out.parts").exists()
    call("merge", recipe, family / "out")
    (family / "out").rename(family / "kept")
    later = call("plan", recipe, family / "out").stdout
    assert "not merged" not in later
    assert f"merged       {family}/out.parts/second is there and will be kept" in later
    told = json.loads(call("plan", recipe, "--json").stdout)["documents"]
    assert [(part["name"], part["pending"], part["done"]) for part in told] == [
        ("first", [], False),
        ("second", ["first"], False),
        (None, ["first", "second"], False),
    ]
    assert told[1]["experts"] == ["OUT.parts/first", str(family / "three")]


def test_a_plan_with_stand_ins_is_the_plan_without(family: Path) -> None:
    recipe = written(family, *CHAIN)
    before: tuple[Stage, ...] = pymerge.plan_documents(recipe, family / "out", max_shard_size=3000)
    pymerge.merge(recipe, family / "out", max_shard_size=3000)
    (family / "out").rename(family / "kept")
    after = pymerge.plan_documents(recipe, family / "out", max_shard_size=3000)
    for early, late in zip(before, after, strict=True):
        assert early.planned.layouts == late.planned.layouts
        assert early.planned.jobs == late.planned.jobs
        assert dict(early.planned.side_files) == dict(late.planned.side_files)


def test_problems_of_all_documents_come_together(family: Path) -> None:
    write_checkpoint(family / "odd", 9, shapes={"a.weight": (41, 50), "b.weight": (70,), "norm": (8,)})
    found = problems(
        family,
        document("first", ["one", "gone"]),
        document("second", ["two", "three"]),
        document("third", ["first", "nowhere"]),
        document(None, ["second", "odd"], None, "tises"),
    )
    assert [text.split(":")[0] for text in found[:2]] == ["document 1 (first)", "document 3 (third)"]
    assert "/gone" in found[0]
    assert "/nowhere" in found[1]
    assert any("document 4: " in text and "'tises'" in text for text in found)
    # Shapes of a merge that is not there yet are known, and messages name the folder that it will have.
    assert any(f"as in expert {family}/out.parts/second" in text for text in found), found
    assert not any("/tmp/pymerge-" in text for text in found)


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        (
            (document("a", ["b", "one"]), document("b", ["one", "two"]), document(None, ["a", "b"])),
            "document 1 (a) takes the merge of document 2 (b), which must stand before it",
        ),
        (
            (document("a", ["b", "one"]), document("b", ["a", "two"]), document(None, ["a", "b"])),
            "document 1 (a) and document 2 (b) need each other's merges",
        ),
        ((document("a", ["a", "one"]), document(None, ["a"])), "document 1 (a) takes its own merge"),
        (
            (document("a", ["one", "two"]), document("a", ["one"]), document(None, ["a"])),
            "document 2: name: 'a' is the name of document 1 already",
        ),
        (
            (document("a", ["one", "two"]), document(None, ["one"]), document(None, ["a"])),
            "documents 2 and 3 have no name; give every document but the one for the output a name",
        ),
        (
            (document("a/b", ["one", "two"]), document(None, ["one"])),
            "document 1: name: 'a/b' cannot be the name of its folder",
        ),
        (
            (document("a.partial", ["one", "two"]), document(None, ["one"])),
            "document 1: name: 'a.partial' cannot be the name of its folder",
        ),
        (
            (document("3", ["one", "two"]), document(None, ["one"])),
            "document 1 (3): name: expected text, found a number (3)",
        ),
    ],
)
def test_documents_that_do_not_fit_together(documents: tuple[str, ...], sentence: str, family: Path) -> None:
    found = problems(family, *documents)
    assert any(text.startswith(sentence) for text in found), found


def test_the_folders_must_not_lie_in_each_other(family: Path) -> None:
    recipe = written(family, *CHAIN)
    for out, parts, sentence in (
        ("out", "out", "lies inside the output"),
        ("out", "out/parts", "lies inside the output"),
        ("parts/first", "parts", "lies inside the intermediate merge"),
        ("parts/first/x", "parts", "lies inside the intermediate merge"),
    ):
        result = call("merge", recipe, family / out, "--intermediate-dir", family / parts)
        assert result.exit_code == 2
        assert sentence in result.stderr


def test_names_stand_for_merges_before_they_stand_for_files(family: Path) -> None:
    recipe = written(family, document("one", ["two", "three"]), document(None, ["one", "base"]))
    taken = pymerge.plan_documents(recipe, family / "out")[1].summary()["experts"]
    assert taken == [f"{family}/out.parts/one", f"{family}/base"]


def test_where_all_have_names_the_last_is_the_output(family: Path) -> None:
    recipe = written(family, document("a", ["two", "three"]), document("b", ["a", "base"]))
    result = call("merge", recipe, family / "out")
    assert "note: name 'b' has no effect: this merge is the output" in result.stderr
    assert (family / "out" / "model.safetensors").exists()
    assert [path.name for path in (family / "out.parts").iterdir()] == ["a"]


def test_a_merge_may_lend_its_tokenizer_and_be_a_base(family: Path) -> None:
    text = document(None, ["one", "two"], "first", "task_arithmetic")
    pymerge.merge(written(family, CHAIN[0], text), family / "out")
    assert (family / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((family / "out" / "config.json").read_text())["model_type"] == "base"


def test_too_little_memory_for_any_is_said_before_the_first(family: Path) -> None:
    result = call("merge", written(family, *CHAIN), family / "out", "--max-memory", "1KB")
    assert (result.exit_code, (family / "out.parts").exists()) == (2, False)
    assert "too little" in result.stderr
