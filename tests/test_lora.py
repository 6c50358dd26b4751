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
from families import SHAPES, Tensors, make_family, read_checkpoint, weight_digests, write_recipe
from safetensors.torch import save_file
from torch import Tensor

import pymerge
from pymerge.backends import reference
from pymerge.backends.native import NativeRun, OpenFile, Settings
from pymerge.errors import PymergeError
from pymerge.job import Region
from pymerge.recipe import parse_recipe
from pymerge.rule import Scope

Q, K, DOWN = (f"model.layers.{n}" for n in ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.mlp.down_proj"))
EMBED, NORM = "model.embed_tokens", "model.norm"


def write_lora(
    folder: Path,
    modules: Mapping[str, int],
    seed: int,
    whole: Tensors | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """A PEFT folder with factors of the given ranks; and per module the factors, left and right."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    turned = bool(config.get("fan_in_fan_out"))
    tensors: Tensors = {f"base_model.model.{name}.weight": x for name, x in (whole or {}).items()}
    factors = {}
    for module, rank in modules.items():
        shape = SHAPES[f"{module}.weight"]
        flip = turned or module == EMBED
        out, into = reversed(shape) if flip else shape
        a, b = (0.1 * torch.randn(s, generator=g).to(dtype) for s in ((rank, into), (out, rank)))
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBED
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"base_model.model.{module}.{n}": x for n, x in zip(names, (a, b), strict=True)}
        factors[module] = (a.T, b.T) if flip else (b, a)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder, factors


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
        ({"r": "x"}, "{lora}/adapter_config.json: r is 'x', expected a number above 0"),
        ({"rank_pattern": [1]}, "{lora}/adapter_config.json: rank_pattern is no mapping of numbers"),
        ({"alpha_pattern": {"(": 1}}, "'(' is no regular expression"),
        ({"alpha_pattern": {"a{99999999999}": 1}}, "is no regular expression"),
        ({"rank_pattern": {"([a-z.]+)+!": 4}}, "has a pattern that is too long or repeats a group"),
        ({"rank_pattern": {"q_proj": 0.5}}, "a rank is 0.5, expected a whole number"),
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
