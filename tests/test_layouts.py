"""Checkpoints that transformers would lay out otherwise: single files, state dicts, parts of pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made import random_bytes, write_file

import pymerge
from pymerge.checkpoint.index import open_checkpoint
from pymerge.dtypes import DType
from pymerge.errors import ProblemList

DIFFUSERS = "diffusion_pytorch_model"


def write(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,)}
    write_file(
        path,
        {n: (DType.BF16, shape, random_bytes(n, seed, DType.BF16, shape)) for n, shape in shapes.items()},
    )
    return path


def merged(folder: Path, first: str, second: str, **options: str) -> set[str]:
    text = (
        f"merge_method: linear\nmodels: [{{model: {first}}}, {{model: {second}}}]\nparameters: {{weight: 1}}"
    )
    (folder / "recipe.yml").write_text(text)
    shutil.rmtree(folder / "out", ignore_errors=True)
    pymerge.merge(folder / "recipe.yml", folder / "out", **options)  # type: ignore[arg-type]
    beside = {"README.md", "merge.manifest.json", "mergekit_config.yml"}
    return {path.name for path in (folder / "out").iterdir()} - beside


def refused(folder: Path, first: str, second: str) -> str:
    with pytest.raises(ProblemList) as caught:
        merged(folder, first, second)
    return caught.value.problems[0]


@pytest.fixture
def pipelines(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name / "unet" / f"{DIFFUSERS}.safetensors", seed)
        write(tmp_path / name / "text_encoder" / "model.safetensors", seed)
        (tmp_path / name / "scheduler").mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    return tmp_path


def test_single_files_and_plain_state_dicts(tmp_path: Path) -> None:
    """Without a config.json none is made up."""
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / f"{name}.safetensors", seed)
        write(tmp_path / name / "weights.safetensors", seed)
    assert merged(tmp_path, "one.safetensors", "two.safetensors") == {"model.safetensors"}
    alone = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert merged(tmp_path, "one", "two") == {"model.safetensors"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == alone


def test_a_part_of_a_pipeline_keeps_the_names_that_diffusers_looks_for(pipelines: Path) -> None:
    assert merged(pipelines, "one/unet", "two/unet") == {f"{DIFFUSERS}.safetensors", "config.json"}
    config = json.loads((pipelines / "out" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    names = merged(pipelines, "one/unet", "two/unet", max_shard_size="300")
    assert names == {
        f"{DIFFUSERS}-00001-of-00002.safetensors",
        f"{DIFFUSERS}-00002-of-00002.safetensors",
        f"{DIFFUSERS}.safetensors.index.json",
        "config.json",
    }
    assert set(open_checkpoint(pipelines / "out").tensors) == {"conv_in.weight", "conv_in.bias"}
    assert merged(pipelines, "one/text_encoder", "two/text_encoder") == {"model.safetensors"}


def test_a_whole_pipeline_is_refused_with_the_names_of_its_parts(pipelines: Path) -> None:
    assert refused(pipelines, "one", "two") == (
        f"{pipelines}/one: the folder holds no safetensors file, its folders do ('text_encoder', 'unet'), as"
        f" the parts of a pipeline; name one of them, such as {pipelines}/one/text_encoder, and merge each by"
        " a recipe of its own"
    )


def test_of_several_variants_one_must_be_named(pipelines: Path) -> None:
    variants = [f"{DIFFUSERS}.fp16.safetensors", f"{DIFFUSERS}.safetensors"]
    for name in ("one", "two"):
        write(pipelines / name / "unet" / variants[0], 5)
    assert refused(pipelines, "one/unet", "two/unet") == (
        f"{pipelines}/one/unet: the folder holds files ({variants[0]!r}, {variants[1]!r}) but no"
        " model.safetensors.index.json; where each is a model, name one"
    )
    names = merged(pipelines, f"one/unet/{variants[0]}", f"two/unet/{variants[0]}")
    assert names == {f"{DIFFUSERS}.safetensors", "config.json"}
