"""Bad input: one clear sentence naming file and tensor, exit code 2, and no output folder."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from families import Tensors, write_checkpoint, write_recipe

from pymerge.backends.native import NativeRun, Settings
from pymerge.cli import main
from pymerge.errors import CheckpointError
from pymerge.planner import make_plan
from pymerge.recipe import load_recipe
from pymerge.run.local import execute_plan

INDEX = "model.safetensors.index.json"
SECOND_SHARD = "model-00002-of-00002.safetensors"


class Workshop:
    """A sound family of two experts in a folder of its own, for tests to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        g = torch.Generator().manual_seed(1)
        self.tensors: Tensors = {
            "a.weight": torch.randn(16, 8, generator=g).bfloat16(),
            "b.weight": torch.randn(40, generator=g).bfloat16(),
            "ids": torch.arange(6),
        }
        self.base = write_checkpoint(folder / "base", self.tensors, 2)
        self.one = write_checkpoint(folder / "one", self.tensors, 2)
        self.two = write_checkpoint(folder / "two", self.tensors, 1)
        self.file = self.two / "model.safetensors"

    def recipe(self, method: str = "ties", each: Sequence[dict[str, Any]] | None = None, **top: Any) -> Path:
        """A recipe for the family; `top`: further keys of the recipe."""
        base = None if method == "linear" else self.base
        models = [self.one, self.two]
        return write_recipe(self.folder / "recipe.yml", method, models, base, each=each, **top)

    def merge(self, recipe: Path | None = None, out: Path | None = None) -> Result:
        arguments = ["merge", str(recipe or self.recipe()), str(out or self.out), "--quiet"]
        return CliRunner().invoke(main, arguments)

    def rewrite(self, tensors: Tensors) -> None:
        """Expert two with other tensors."""
        self.file.unlink()
        (self.two / "config.json").unlink()
        self.two.rmdir()
        write_checkpoint(self.two, tensors, 1)


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def assert_refused(result: Result, shop: Workshop, *named: str, sentences: int = 1) -> None:
    """Exit code 2, the sentences with all that they must name, and nothing where the output would be."""
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == sentences, result.stderr
    assert "Traceback" not in result.stderr
    for fragment in named:
        assert fragment in result.stderr, f"{fragment!r} is not in {result.stderr!r}"
    assert not shop.out.exists()
    assert not list(shop.folder.glob("out.*")), "a staging folder was left"


def test_the_sound_family_merges(shop: Workshop) -> None:
    result = shop.merge()
    assert result.exit_code == 0, (result.output, result.exception)
    assert (shop.out / "model.safetensors").exists()


def test_the_process_ends_with_2(shop: Workshop) -> None:
    recipe = shop.recipe(method="tise")
    command = [sys.executable, "-m", "pymerge", "merge", str(recipe), str(shop.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1


# -- files --------------------------------------------------------------------------------------------------


def test_missing_folder(shop: Workshop) -> None:
    recipe = write_recipe(shop.folder / "r.yml", "ties", [shop.one, shop.folder / "nowhere"], shop.base)
    assert_refused(shop.merge(recipe), shop, str(shop.folder / "nowhere"))


def test_missing_shard(shop: Workshop) -> None:
    (shop.one / SECOND_SHARD).unlink()
    assert_refused(shop.merge(), shop, str(shop.one / SECOND_SHARD), "missing")


@pytest.mark.parametrize("name", ["../two/model.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_names_a_file_outside_its_folder(shop: Workshop, name: str) -> None:
    index = shop.one / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["b.weight"] = name
    index.write_text(json.dumps(content))
    assert_refused(shop.merge(), shop, str(index), name)


def test_truncated_before_the_run(shop: Workshop) -> None:
    os.truncate(shop.file, shop.file.stat().st_size - 1)
    assert_refused(shop.merge(), shop, str(shop.file), "truncated")


@pytest.mark.parametrize("left", [0, 100, -1])
def test_truncated_during_the_run(shop: Workshop, left: int) -> None:
    """The file shrinks after it was planned and opened; `left` < 0 counts from its end."""
    plan = make_plan(load_recipe(shop.recipe()), shop.out)

    def start(*arguments: Any) -> NativeRun:
        os.truncate(shop.file, left if left >= 0 else shop.file.stat().st_size + left)
        return NativeRun(*arguments)

    with pytest.raises(CheckpointError) as caught:
        execute_plan(plan, shop.out, Settings(threads=2), None, start)
    assert str(shop.file) in str(caught.value)
    assert any(name in str(caught.value) for name in shop.tensors)
    assert len(str(caught.value).splitlines()) == 1
    assert not shop.out.exists()
    assert not list(shop.folder.glob("out.*"))


def test_changed_between_plan_and_run(shop: Workshop) -> None:
    plan = make_plan(load_recipe(shop.recipe()), shop.out)
    with shop.file.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="changed"):
        execute_plan(plan, shop.out, Settings(threads=1), None)
    assert not list(shop.folder.glob("out*"))


def test_pickle_only(shop: Workshop) -> None:
    shop.file.unlink()
    (shop.two / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert_refused(shop.merge(), shop, str(shop.two), "pytorch_model.bin")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n",
            "git-LFS",
        ),
        (pickle.dumps({"a": [1.0] * 50}), "pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "zip"),
        (b"", "0 bytes"),
        (b"\x02\0\0\0\0\0\0", "7 bytes"),
    ],
)
def test_not_safetensors_at_all(shop: Workshop, content: bytes, said: str) -> None:
    shop.file.write_bytes(content)
    assert_refused(shop.merge(), shop, str(shop.file), said)


def entry(shape: object, begin: int, end: int, dtype: object = "F32", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


LIES: dict[str, tuple[object, int]] = {  # name -> header (or its JSON text), bytes of data
    "past the end": ({"a": entry([8], 0, 32)}, 16),
    "trailing bytes": ({"a": entry([2], 0, 8)}, 9),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8),
    "shape too large": ({"a": entry([3], 0, 8)}, 8),
    "shape wraps to the right size": ({"a": entry([2**62 + 2, 4], 0, 32)}, 32),
    "begin after end": ({"a": entry([0], 4, 0)}, 4),
    "negative offset": ({"a": entry([1], -4, 0)}, 4),
    "negative dimension": ({"a": entry([-1, -1], 0, 4)}, 4),
    "fraction": ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, 4),
    "unknown dtype": ({"a": entry([1], 0, 4, "F31")}, 4),
    "lower case dtype": ({"a": entry([1], 0, 4, "f32")}, 4),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "one more field": ({"a": entry([1], 0, 4, strides=[1])}, 4),
    "terabyte": ({"a": entry([2**38], 0, 2**40)}, 100),
    "duplicate tensor": ('{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)),) * 2), 4),
    "junk after": ("{} x", 0),
    "array": ("[]", 0),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0),
    "deep": ('{"a":' + "[" * 100_000, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(shop: Workshop, lie: str) -> None:
    header, size = LIES[lie]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    shop.file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    assert_refused(shop.merge(), shop, str(shop.file))


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 100_000_001, 10**6])
def test_a_header_length_that_lies(shop: Workshop, length: int) -> None:
    shop.file.write_bytes(length.to_bytes(8, "little") + shop.file.read_bytes()[8:])
    assert_refused(shop.merge(), shop, str(shop.file))


def test_duplicate_names_are_named(shop: Workshop) -> None:
    header, size = LIES["duplicate tensor"]
    text = str(header).encode()
    shop.file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    assert_refused(shop.merge(), shop, "'a'", "twice")


def test_one_tensor_in_two_shards(shop: Workshop) -> None:
    first = shop.one / "model-00001-of-00002.safetensors"
    (shop.one / SECOND_SHARD).write_bytes(first.read_bytes())
    result = shop.merge()
    assert_refused(result, shop, str(shop.one), "a.weight", sentences=len(result.stderr.splitlines()))


# -- tensors ------------------------------------------------------------------------------------------------


def change_shape(tensors: Tensors) -> Tensors:
    return tensors | {"b.weight": tensors["b.weight"][:-1].clone()}


def transpose(tensors: Tensors) -> Tensors:
    return tensors | {"a.weight": tensors["a.weight"].t().contiguous()}


def drop(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name != "b.weight"}


def make_float8(tensors: Tensors) -> Tensors:
    return tensors | {"b.weight": tensors["b.weight"].to(torch.float8_e4m3fn)}


def make_integer(tensors: Tensors) -> Tensors:
    return tensors | {"b.weight": torch.zeros(40, dtype=torch.int16)}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (drop, ("two", "b.weight")),
        (change_shape, ("two", "b.weight", "[39]", "[40]")),
        (transpose, ("two", "a.weight", "[8, 16]", "[16, 8]")),
        (make_integer, ("two", "b.weight", "I16", "BF16")),
    ],
)
def test_a_tensor_that_does_not_fit(
    shop: Workshop, spoil: Callable[[Tensors], Tensors], named: tuple[str, ...]
) -> None:
    shop.rewrite(spoil(shop.tensors))
    assert_refused(shop.merge(), shop, *named)


def test_unsupported_dtype(shop: Workshop) -> None:
    shop.rewrite(make_float8(shop.tensors))
    result = shop.merge()
    assert_refused(result, shop, "two", "b.weight", "F8_E4M3", sentences=len(result.stderr.splitlines()))


def test_integers_that_differ(shop: Workshop) -> None:
    shop.rewrite(shop.tensors | {"ids": torch.arange(6) * 2})
    assert_refused(shop.merge(), shop, "two", "ids")


def test_all_problems_are_reported_together(shop: Workshop) -> None:
    shop.rewrite(drop(transpose(shop.tensors)))
    (shop.one / SECOND_SHARD).unlink()
    recipe = shop.recipe(each=[{"weight": 1.0, "density": 1.5}, {"weight": 1.0}])
    result = shop.merge(recipe)
    assert_refused(result, shop, "a.weight", "b.weight", SECOND_SHARD, "1.5", sentences=4)


# -- recipes ------------------------------------------------------------------------------------------------


def test_unknown_recipe_key_names_the_nearest(shop: Workshop) -> None:
    assert_refused(shop.merge(shop.recipe(out_dtpye="float32")), shop, "out_dtpye", "out_dtype")


def test_unknown_parameter_names_the_nearest(shop: Workshop) -> None:
    each = [{"weight": 1.0, "densty": 0.5}, {"weight": 1.0}]
    assert_refused(shop.merge(shop.recipe(each=each)), shop, "densty", "density")


def test_unknown_method_lists_the_known(shop: Workshop) -> None:
    known = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    assert_refused(shop.merge(shop.recipe(method="frankenmerge")), shop, "frankenmerge", *known)


@pytest.mark.parametrize("density", [-0.1, 1.0001, 20, float("inf")])
def test_density_outside_0_to_1(shop: Workshop, density: float) -> None:
    text = shop.recipe(each=[{"weight": 1.0, "density": 0.25}, {"weight": 1.0}]).read_text()
    shown = ".inf" if density == float("inf") else str(density)
    recipe = shop.folder / "recipe.yml"
    recipe.write_text(text.replace("0.25", shown))
    assert_refused(shop.merge(recipe), shop, "density")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear"])
def test_weights_that_sum_to_zero_under_normalize(shop: Workshop, method: str) -> None:
    each = [{"weight": 0.5}, {"weight": -0.5}]
    recipe = shop.recipe(method=method, each=each, parameters={"normalize": True})
    assert_refused(shop.merge(recipe), shop, "weights", "sum")


# -- the output ---------------------------------------------------------------------------------------------


def test_output_that_exists(shop: Workshop) -> None:
    taken = shop.folder / "taken"
    taken.mkdir()
    (taken / "keep").write_text("mine")
    assert_refused(shop.merge(out=taken), shop, str(taken), "exists")
    assert [path.name for path in taken.iterdir()] == ["keep"]


def test_output_inside_an_input(shop: Workshop) -> None:
    before = sorted(shop.one.iterdir())
    assert_refused(shop.merge(out=shop.one / "merged"), shop, str(shop.one / "merged"), "inside")
    assert sorted(shop.one.iterdir()) == before


def test_too_little_disk_space(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=64, f_bfree=1))
    assert_refused(shop.merge(), shop, str(shop.out), "64")
