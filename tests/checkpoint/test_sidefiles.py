"""Which files travel with the weights, and what the model card says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from pymerge.checkpoint.sidefiles import collect, hub_name, model_card, with_dtype
from pymerge.dtypes import DType
from pymerge.errors import ProblemList


def config(folder: Path, **keys: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **keys, "hidden_size": 64}))


def config_out(folder: Path, dtype: DType) -> Any:
    return json.loads(with_dtype(folder / "config.json", collect(folder)["config.json"], dtype))


def test_only_listed_files_travel(tmp_path: Path) -> None:
    wanted = {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE",
        "merges.txt",
    }
    unwanted = {
        "modeling_x.py",
        "README.md",
        "optimizer.pt",
        "training_args.bin",
        "model.safetensors",
        ".gitattributes",
    }
    for name in wanted | unwanted:
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "tokenizer.json").write_bytes(b"\x00\xff not touched\r\n")
    found = collect(tmp_path)
    assert set(found) == wanted
    assert found["tokenizer.json"] == b"\x00\xff not touched\r\n"
    assert collect(tmp_path / "model.safetensors") == found


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert collect(tmp_path) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_config_gets_the_dtype_under_the_key_it_has(
    before: dict[str, str], after: dict[str, str], tmp_path: Path
) -> None:
    config(tmp_path, **before)
    assert config_out(tmp_path, DType.BF16) == {"model_type": "llama", "hidden_size": 64, **after}


def test_the_rest_of_the_config_is_kept(tmp_path: Path) -> None:
    text = '{"z": 1, "name": "ü", "limit": [0.0, Infinity], "dtype": "float32", "eps": 1e-05}'
    (tmp_path / "config.json").write_text(text)
    assert collect(tmp_path)["config.json"] == text.encode()
    found = config_out(tmp_path, DType.F16)
    assert list(found) == ["z", "name", "limit", "dtype", "eps"]
    assert found == {"z": 1, "name": "ü", "limit": [0.0, float("inf")], "dtype": "float16", "eps": 1e-5}


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff{}", b"[" * 100_000])
def test_a_damaged_config_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ProblemList, match="JSON") as caught:
        collect(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_only_regular_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"text")
    (tmp_path / "LICENSE").symlink_to("blob")
    assert collect(tmp_path) == {"LICENSE": b"text"}
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ProblemList, match="not a regular file"):
        collect(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**29)
    with pytest.raises(ProblemList, match="allowed are at most"):
        collect(tmp_path)


RECIPE = "merge_method: ties\nbase_model: org/base\nmodels:\n  - model: /data/x\n# ```\n"


def card(**changes: object) -> ModelCard:
    given: dict[str, Any] = {
        "name": "merged",
        "method": "ties",
        "base_model": "org/base",
        "models": ["org/expert-1", "/data/my_model", "/c/hub/models--owner--name/snapshots/abc"],
        "recipe": RECIPE,
    }
    return ModelCard(model_card(**{**given, **changes}).decode("utf-8"))


def test_model_card() -> None:
    found = card()
    assert found.data.to_dict() == {
        "base_model": ["org/base", "org/expert-1", "owner/name"],
        "library_name": "transformers",
        "tags": ["merge", "pymerge"],
    }
    assert "method `ties`" in found.text
    assert "Base model: org/base\n" in found.text
    assert "- org/expert-1\n- /data/my\\_model\n- owner/name\n" in found.text
    fenced = found.text.split("````yaml\n")[1].split("\n````\n")[0]
    assert yaml.safe_load(fenced) == yaml.safe_load(RECIPE)
    assert fenced + "\n" == RECIPE


def test_front_matter_is_that_of_huggingface_hub() -> None:
    odd = ["/c/models--1:30--~/snapshots/a", "/c/models--a: [--# é\x85\n---/snapshots/a", "é"]
    data = ModelCardData(
        base_model=["1/2", "yes/no", "1:30/~", "a: [/# é\x85\n---"],
        library_name="transformers",
        tags=["merge", "pymerge"],
    )
    text = model_card(
        name="x", method="m", base_model=None, models=["1/2", "yes/no", *odd], recipe=""
    ).decode("utf-8")
    assert text.startswith(f"---\n{data.to_yaml()}\n---\n")


def test_model_card_without_base_or_hub_names() -> None:
    found = card(base_model=None, models=["/a", "./b"], paper="https://arxiv.org/abs/2306.01708")
    assert "base_model" not in found.data.to_dict()
    assert "Base model" not in found.text
    assert "(https://arxiv.org/abs/2306.01708)" in found.text


def test_model_card_cannot_be_broken_out_of() -> None:
    found = card(name="x\n# [big](http://evil) <b>", models=["a\n---\nb"], recipe="`````\n")
    assert "# x�\\# \\[big\\](http://evil) \\<b\\>\n" in found.text
    assert "- a�---�b\n" in found.text
    assert "\n``````yaml\n`````\n``````\n" in found.text
    assert b"\\udcff" in model_card(name="\udcff", method="m", base_model=None, models=[], recipe="\udcff")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/name", "org/name"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/c/models--a--b/snapshots/0123", "a/b"),
        ("/c/models--a--b/snapshots/0123/model.safetensors", "a/b"),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("name", None),
        ("a/b/c", None),
        ("a/..", None),
        ("a b/c", None),
    ],
)
def test_hub_names(source: str, name: str | None) -> None:
    assert hub_name(source) == name


def test_a_card_tells_no_more_of_local_paths_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    models = ["org/other", f"{tmp_path}/models/a", f"{tmp_path}/models/a+{tmp_path}/lora", "/data/x"]
    found = card(models=models)
    assert "Base model: org/base\n" in found.text
    assert found.data.to_dict()["base_model"] == ["org/other"]  # org/base is a folder here
    assert "- org/other\n- models/a\n- models/a+lora\n- /data/x\n" in found.text
