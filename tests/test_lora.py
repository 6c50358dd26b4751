"""Models with a LoRA: base + scale * B @ A in float32, one rounding, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    EMBED,
    SHAPES,
    Tensors,
    make_family,
    read_checkpoint,
    weight_digests,
    write_lora,
    write_recipe,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymerge
from pymerge.backends import reference
from pymerge.backends.native import NativeRun, OpenFile, Settings
from pymerge.errors import ProblemList, PymergeError
from pymerge.job import Region
from pymerge.recipe import parse_recipe
from pymerge.rule import Scope

Q, K, DOWN = (f"model.layers.{n}" for n in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.down_proj"))
NORM = "model.norm"


def adapted(base: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """One rank after the other, every operation rounded to float32, the end to the base's type."""
    work = torch.float64 if base.dtype is torch.float64 else torch.float32
    total = torch.zeros(base.shape, dtype=work)
    for r in range(left.shape[1]):
        total = total + left[:, r, None].to(work) * right[None, r].to(work)
    return (base.to(work) + torch.tensor(scale, dtype=work) * total).to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["passthrough", "linear", "ties"])
def test_every_element(tmp_path: Path, dtype: torch.dtype, method: str) -> None:
    family = make_family(tmp_path, dtype, experts=0)
    norm = torch.full(SHAPES[f"{NORM}.weight"], 3.0)
    one, first = write_lora(
        tmp_path / "one", {Q: 4, K: 2, DOWN: 4}, 1, rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 3}
    )
    two, second = write_lora(
        tmp_path / "two", {Q: 4, EMBED: 4}, 2, {NORM: norm}, torch.bfloat16, use_rslora=True
    )
    models = [{name: x.clone() for name, x in family.base.items()} for _ in range(2)]
    for module, (left, right) in first.items():
        name = f"{module}.weight"
        models[0][name] = adapted(family.base[name], left, right, 1.5 if module == K else 2.0)
    for module, (left, right) in second.items():
        name = f"{module}.weight"
        models[1][name] = adapted(family.base[name], left, right, 8 / math.sqrt(4))
    models[1][f"{NORM}.weight"] = norm
    paths = [Path(f"{family.base_path}+{lora}") for lora in (one, two)]
    if method == "passthrough":
        for path, model in zip(paths, models, strict=True):
            found = run(tmp_path, method, [path])
            for name, x in model.items():
                assert torch.equal(found[name], x), name
        return
    base = family.base_path if method == "ties" else None
    each = [{"weight": 0.5, "density": 0.5}, {"weight": 0.25, "density": 0.7}]
    found = run(tmp_path, method, paths, base, each)
    rules = {j.name: j.rule for s in pymerge.plan(tmp_path / "recipe.yml").jobs for j in s}
    for name in SHAPES:
        rule = rules[name]
        assert rule is not None
        bases = [family.base[name]] if base else None
        experts = [[model[name] for model in models]]
        [expected] = reference.merge_group([name], bases, experts, rule, [found[name].dtype], None)
        assert torch.equal(found[name], expected.reshape(found[name].shape)), name


def run(
    folder: Path,
    method: str,
    models: Sequence[Path],
    base: Path | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> Tensors:
    recipe = write_recipe(folder / "recipe.yml", method, models, base, each=each)
    out = folder / f"out{len(list(folder.glob('out*')))}"
    planned = pymerge.plan(recipe, out)
    summary = pymerge.merge(recipe, out)
    if method != "ties":  # whose thresholds take a sample besides
        assert summary.bytes_read == planned.bytes_read
    return read_checkpoint(out)


def test_factors_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, factors = write_lora(tmp_path / "one", {Q: 4, K: 4, DOWN: 4}, 1, fan_in_fan_out=True)
    found = run(tmp_path, "passthrough", [Path(f"{family.base_path}+{lora}")])
    for module, (left, right) in factors.items():
        name = f"{module}.weight"
        assert torch.equal(found[name], adapted(family.base[name], left, right, 2.0))


def test_same_bits_for_any_tile_and_threads(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=1)
    lora, _ = write_lora(tmp_path / "one", {Q: 4, EMBED: 4}, 1)
    models = [Path(f"{family.base_path}+{lora}"), family.expert_paths[0]]
    each = [{"weight": 1.0, "density": 0.3}] * 2
    recipe = write_recipe(tmp_path / "recipe.yml", "ties", models, family.base_path, each=each)
    digests = set()
    for number, (threads, memory) in enumerate([(1, None), (2, None), (2, "3MB")]):
        out = tmp_path / f"out{number}"
        pymerge.merge(recipe, out, threads=threads, max_memory=memory)
        digests.add(str(weight_digests(out)))
    assert len(digests) == 1


def test_how_a_recipe_names_them(tmp_path: Path) -> None:
    for name in ("base", "lora", "a+b"):
        (tmp_path / name).mkdir()
    forms = ["base+lora", "base@main+lora@main", "{model: base, lora: lora}"]
    forms.append("{model: {path: base}, lora: {path: lora}}")
    for form in forms:
        recipe = parse_recipe(f"merge_method: linear\nmodels: [{{model: {form}}}]\n", tmp_path)
        path = recipe.models[0].path
        assert path == Path(f"{tmp_path}/base+{tmp_path}/lora")
        assert recipe.adapted[path] == (tmp_path / "base", tmp_path / "lora")
        assert recipe.paths == [tmp_path / "base", tmp_path / "lora"]
    plain = parse_recipe("merge_method: linear\nmodels: [{model: a+b}]\n", tmp_path)
    assert plain.models[0].path == tmp_path / "a+b"
    with pytest.raises(PymergeError, match=r"models\[0\]\.model \(its LoRA\): no such file or folder"):
        parse_recipe("merge_method: linear\nmodels: [{model: base+nowhere}]\n", tmp_path)


def test_the_card_and_the_configuration_are_the_models(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, _ = write_lora(tmp_path / "one", {Q: 4}, 1)
    run(tmp_path, "passthrough", [Path(f"{family.base_path}+{lora}")])
    assert json.loads((tmp_path / "out0" / "config.json").read_text())["model_type"] == "llama"
    assert str(lora) in (tmp_path / "out0" / "README.md").read_text().replace("\\", "")


def test_a_changed_scale_starts_a_resumed_merge_anew(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    digests = []
    for name, alpha in (("one", 8), ("two", 16)):
        lora, _ = write_lora(tmp_path / name, {Q: 4}, 1, lora_alpha=alpha)
        if name == "two":
            (tmp_path / "one" / "adapter_config.json").write_bytes(
                (lora / "adapter_config.json").read_bytes()
            )
        path = Path(f"{family.base_path}+{tmp_path / 'one'}")
        digests.append(pymerge.plan(write_recipe(tmp_path / "r.yml", "passthrough", [path])).digest())
    assert digests[0] != digests[1]
    assert digests[0]["inputs"] == digests[1]["inputs"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "{lora}/adapter_config.json: use_dora True is not supported"),
        ({"bias": "all"}, "{lora}/adapter_config.json: bias 'all' is not supported"),
        ({"peft_type": "VERA"}, "{lora}/adapter_config.json: peft_type 'VERA' is not supported"),
        ({"r": "x"}, "{lora}/adapter_config.json: r is 'x', expected a whole number above 0"),
        (
            {"rank_pattern": [1]},
            "{lora}/adapter_config.json: rank_pattern is [1], expected a mapping of whole numbers above 0",
        ),
        ({"alpha_pattern": {"(": 1}}, "'(' is no regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 1}}, "is no regular expression"),
        ({"rank_pattern": {"([a-z.]+)+!": 4}}, "has a pattern that is too long or repeats a group"),
        (
            {"rank_pattern": {"q_proj": 0.5}},
            "rank_pattern has 0.5 for 'q_proj', expected whole numbers above 0",
        ),
        ({"r": 1e-300}, "r is 1e-300, expected a whole number above 0"),
        ({"lora_alpha": 1e-320}, "lora_alpha is 1e-320, expected a number from 1e-9 to 1e9"),
        ({"alpha_pattern": {"q_proj": 1e-320}}, "alpha_pattern has 1e-320 for 'q_proj', expected numbers"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        (
            {"r": 3},
            "the factors have shapes [4, 64] and [64, 4], expected [3, 64] and [64, 3] for shape [64, 64]",
        ),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, config: Mapping[str, Any], sentence: str) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, _ = write_lora(tmp_path / "one", {Q: 4}, 1, **config)
    refused(tmp_path, family.base_path, lora, sentence)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (f"base_model.model.{Q}.lora_magnitude_vector", (64,), "is of a kind that is not supported"),
        ("base_model.model.nowhere.weight", (2,), "it changes tensor 'nowhere.weight', which {base} lacks"),
        ("base_model.model.model.norm.weight", (2,), "'model.norm.weight' has shape [2], expected [64]"),
        (f"base_model.model.{K}.lora_A.weight", (4, 64), "has lora_A without the other factor"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str, shape: tuple[int, ...], sentence: str) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, _ = write_lora(tmp_path / "one", {}, 1)
    save_file({name: torch.zeros(shape)}, lora / "adapter_model.safetensors")
    refused(tmp_path, family.base_path, lora, sentence)


@pytest.mark.parametrize(
    ("second", "target"),
    [("lora_A.default.weight", Q), ("lora_embedding_A", Q), ("weight", Q), ("modules_to_save.weight", Q)],
)
def test_two_tensors_for_one_are_refused(tmp_path: Path, second: str, target: str) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, _ = write_lora(tmp_path / "one", {Q: 4}, 1)
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    added = f"base_model.model.{Q}.{second}"
    save_file({**tensors, added: torch.zeros(64, 64)}, file)
    names = [f"base_model.model.{Q}.lora_A.weight", added]
    with pytest.raises(PymergeError) as caught:
        pymerge.plan(write_recipe(tmp_path / "r.yml", "passthrough", [Path(f"{family.base_path}+{lora}")]))
    said = [f"tensors {a!r} and {b!r} are both for {target!r}" for a, b in (names, names[::-1])]
    assert any(sentence in str(caught.value) for sentence in said)


def test_all_that_is_wrong_with_loras_and_their_models_is_said_together(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    one, _ = write_lora(tmp_path / "one", {Q: 4}, 1, use_dora=True, r="x")
    save_file({"nowhere.lora_A.weight": torch.zeros(4, 4)}, one / "adapter_model.safetensors")
    two, _ = write_lora(tmp_path / "two", {K: 4}, 2)
    (two / "adapter_model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    models = [Path(f"{family.base_path}+{one}"), Path(f"{tmp_path / 'empty'}+{two}")]
    with pytest.raises(ProblemList) as caught:
        pymerge.plan(write_recipe(tmp_path / "r.yml", "linear", models))
    said = "\n".join(caught.value.problems)
    for sentence in (
        f"{one}/adapter_config.json: use_dora True is not supported",
        f"{one}/adapter_config.json: r is 'x', expected a whole number above 0",
        f"{one}/adapter_model.safetensors: 'nowhere' has lora_A without the other factor",
        f"{tmp_path / 'empty'}: the folder holds no safetensors file",
        f"{two}/adapter_model.safetensors: the file does not exist",
    ):
        assert sentence in said


def refused(folder: Path, base: Path, lora: Path, sentence: str) -> None:
    recipe = write_recipe(folder / "recipe.yml", "passthrough", [Path(f"{base}+{lora}")])
    with pytest.raises(PymergeError) as caught:
        pymerge.plan(recipe)
    assert sentence.format(lora=lora, base=base) in str(caught.value)


def test_a_lora_that_is_cut_short_is_named(tmp_path: Path) -> None:
    family = make_family(tmp_path, torch.bfloat16, experts=0)
    lora, _ = write_lora(tmp_path / "one", {Q: 4}, 1)
    recipe = write_recipe(tmp_path / "recipe.yml", "passthrough", [Path(f"{family.base_path}+{lora}")])
    plan = pymerge.plan(recipe)
    file = lora / "adapter_model.safetensors"
    job = next(job for shard in plan.jobs for job in shard if job.name == f"{Q}.weight")
    short = tmp_path / "short"
    short.write_bytes(file.read_bytes()[:-8])
    room = torch.zeros(job.count, dtype=torch.bfloat16)
    paths = {number: shard.path for number, shard in enumerate(plan.shards)}
    paths[next(n for n, path in paths.items() if path == file)] = short
    opened = [path.open("rb") for path in paths.values()]
    files = [
        OpenFile(n, str(path), stream.fileno())
        for (n, path), stream in zip(paths.items(), opened, strict=True)
    ]
    into = replace(job, out=Region(job.out.dtype, room.data_ptr()))
    with pytest.raises(PymergeError, match=r"short: tensor 'model.*q_proj\.weight': ends at byte"):
        NativeRun([into], Scope.TENSOR, files, Settings()).execute()
    for stream in opened:
        stream.close()
