"""Carrying out plans: the right bytes, resume, cancellation, changed inputs, what lies beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from cases import METHODS
from made import recipe_text, write_checkpoint

import pymerge
from pymerge.backends.native import NativeRun, OpenFile, Report, Settings
from pymerge.checkpoint.index import open_checkpoint
from pymerge.demo_check import Expectation, expected
from pymerge.dtypes import DType
from pymerge.errors import CheckpointError, OutputError
from pymerge.job import TensorJob
from pymerge.planner import Plan, make_plan
from pymerge.recipe import parse_recipe
from pymerge.rule import Scope
from pymerge.run.local import execute_plan

SHAPES = {"a.weight": (40, 50), "b.weight": (3000,), "norm": (8,), "empty": (0, 3), "scalar": ()}
SMALL_SHARDS = 3000


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes=SHAPES, shards=1 + seed)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pickle.bin").write_text("never copied")
    return tmp_path


def planned(folder: Path, method: str = "ties", density: float = 0.5, **parameters: object) -> Plan:
    base = None if method == "linear" else "base"
    text = recipe_text(method, ["one", "two"], base, weight=0.5, density=density, **parameters)
    return make_plan(parse_recipe(text, folder), folder / "out", max_shard_bytes=SMALL_SHARDS)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "merge.manifest.json"
    }


def bits(folder: Path, name: str) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    ref = checkpoint.tensors[name]
    raw = checkpoint.shards[ref.shard].path.read_bytes()[ref.entry.begin : ref.entry.end]
    return np.frombuffer(raw, dtype=np.uint16)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_expected_bits(method: str, family: Path) -> None:
    density = 1.0 if method in ("linear", "task_arithmetic") else 0.3
    summary = execute_plan(planned(family, method, density), family / "out", Settings())
    what = Expectation(method, (0.5, 0.5), density=density)
    assert bits(family / "out", "empty").size == 0
    for name in SHAPES.keys() - {"empty"}:
        inputs = [bits(family / expert, name) for expert in ("one", "two")]
        wanted = expected(
            what, name, bits(family / "base", name), inputs, SHAPES[name][-1] if SHAPES[name] else 1
        )
        assert bits(family / "out", name).tobytes() == wanted.tobytes(), name
    assert (summary.tensors, summary.shards_resumed, summary.nan_outputs) == (len(SHAPES), 0, 0)
    assert summary.shards > 1


def test_everything_beside_the_weights(family: Path) -> None:
    plan = planned(family)
    summary = execute_plan(plan, family / "out", Settings())
    out = family / "out"
    weights = [layout.file_name for layout in plan.layouts]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *weights,
            "README.md",
            "config.json",
            "merge.manifest.json",
            "mergekit_config.yml",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
    )
    assert (out / "mergekit_config.yml").read_text() == plan.recipe.text
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    manifest = json.loads((out / "merge.manifest.json").read_text())
    found = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    assert found == hashes(out)
    assert [entry["role"] for entry in manifest["inputs"]] == ["base", "expert", "expert"]
    assert manifest["plan"] == json.loads(json.dumps(plan.digest()))
    assert manifest["summary"]["tensors"] == summary.tensors
    assert sum(manifest["files"][name]["tensors"] for name in weights) == len(SHAPES)
    for name in weights:
        assert str(family).encode() not in (out / name).read_bytes()
    assert not (family / "out.partial").exists()


class Fake(NativeRun):
    """The compiled core, which fails or stops before its n-th list of jobs."""

    calls = 0
    fail_at = 0
    error: BaseException = CheckpointError("disk on fire")

    def execute(self) -> Report:
        Fake.calls += 1
        if Fake.calls == Fake.fail_at:
            raise Fake.error
        return super().execute()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(Fake, "calls", 0)
    return Fake


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_resumed_run_gives_the_same_files(
    scope: str, family: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(family, scope=scope)
    execute_plan(plan, family / "whole", Settings())
    shards = len(plan.layouts)
    assert shards > 2
    monkeypatch.setattr(fake, "fail_at", 2 if scope == "tensor" else 1)
    monkeypatch.setattr(fake, "error", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        execute_plan(plan, family / "out", Settings(), start=fake)
    assert not (family / "out").exists()
    assert (family / "out.partial").is_dir()
    monkeypatch.setattr(fake, "calls", 10)
    summary = execute_plan(plan, family / "out", Settings(), start=fake)
    assert summary.shards_resumed == (1 if scope == "tensor" else 0)
    resumed = f"resumed: 1 of {shards} files were finished already"
    assert (resumed in summary.describe()) == (scope == "tensor")
    assert fake.calls - 10 == (shards - 1 if scope == "tensor" else 1)
    one, other = hashes(family / "out"), hashes(family / "whole")
    # The card's title is the output's name.
    assert one.pop("README.md") != other.pop("README.md")
    assert one == other


def test_scope_model_resumes_when_only_some_shards_were_finished(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pymerge.checkpoint.staging import Staging

    plan = planned(family, scope="model")
    execute_plan(plan, family / "whole", Settings())
    finish = Staging.finish
    finished: list[object] = []

    def interrupted(self: Staging, *args: object) -> None:
        if finished:
            raise KeyboardInterrupt
        finished.append(finish(self, *args))  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute_plan(plan, family / "out", Settings())
    monkeypatch.setattr(Staging, "finish", finish)
    execute_plan(plan, family / "out", Settings())
    one, other = hashes(family / "out"), hashes(family / "whole")
    assert {n: h for n, h in one.items() if n != "README.md"} == {
        n: h for n, h in other.items() if n != "README.md"
    }


def test_bad_input_leaves_nothing_behind(
    family: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(family)
    monkeypatch.setattr(fake, "fail_at", 1)
    monkeypatch.setattr(fake, "error", CheckpointError("disk on fire"))
    with pytest.raises(CheckpointError, match="disk on fire"):
        execute_plan(plan, family / "out", Settings(), start=fake)
    assert not (family / "out").exists()
    assert not (family / "out.partial").exists()


def test_a_resume_of_another_plan_is_refused(
    family: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fail_at", 2)
    monkeypatch.setattr(fake, "error", RuntimeError("power cut"))
    with pytest.raises(RuntimeError):
        execute_plan(planned(family), family / "out", Settings(), start=fake)
    with pytest.raises(OutputError, match="recipe"):
        execute_plan(planned(family, density=0.4), family / "out", Settings())


def test_a_resume_with_files_of_another_size_names_the_option(
    family: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fail_at", 2)
    monkeypatch.setattr(fake, "error", RuntimeError("power cut"))
    plan = planned(family)
    with pytest.raises(RuntimeError):
        execute_plan(plan, family / "out", Settings(), start=fake)
    other = make_plan(plan.recipe, family / "out")
    sentence = f"by --max-shard-size the output was {len(plan.layouts)} files, now 1"
    with pytest.raises(OutputError, match=sentence):
        execute_plan(other, family / "out", Settings())


def test_an_input_that_changed_after_planning(family: Path) -> None:
    plan = planned(family)
    path = next(shard.path for shard in plan.inputs[1].checkpoint.shards)
    before = path.read_bytes()
    path.write_bytes(before + b"\0")
    with pytest.raises(CheckpointError, match=f"{path.name} was changed after the merge was planned: it has"):
        execute_plan(plan, family / "out", Settings())
    path.write_bytes(before)
    os.utime(path, ns=(5, 5))
    with pytest.raises(
        CheckpointError, match=f"{path.name} was changed after the merge was planned: its time"
    ):
        execute_plan(plan, family / "out", Settings())
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: the file does not exist"):
        execute_plan(plan, family / "out", Settings())
    assert not (family / "out.partial").exists()


class Endless:
    """A run that ends only when it is cancelled."""

    bytes_done = 7
    finished = 0

    def __init__(
        self, jobs: Sequence[TensorJob], scope: Scope, files: Sequence[OpenFile], settings: Settings
    ) -> None:
        self.cancelled = threading.Event()
        self.fds = [file.fd for file in files if file.fd >= 0]

    def execute(self) -> Report:
        self.cancelled.wait()
        for fd in self.fds:
            os.fstat(fd)
        raise CheckpointError("cancelled")

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_shard_opens_only_the_files_that_it_needs(tmp_path: Path) -> None:
    """The work must grow with the shards, not with their square."""
    shapes = {f"t{number:02}": (4,) for number in range(40)}
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shapes=shapes, shards=40)
    plan = make_plan(
        parse_recipe(recipe_text("linear", ["one", "two"], None), tmp_path), None, max_shard_bytes=8
    )
    given: list[int] = []

    def start(jobs: Sequence[TensorJob], scope: Scope, files: Sequence[OpenFile], how: Settings) -> NativeRun:
        given.append(len(files))
        return NativeRun(jobs, scope, files, how)

    execute_plan(plan, tmp_path / "out", Settings(), start=start)
    assert given == [2 + 1] * 40


def test_an_interrupt_cancels_and_keeps_the_staging_folder(family: Path) -> None:
    class Impatient:
        def begin(self, total: int) -> None:
            assert total > 0

        def update(self, done: int) -> None:
            assert done == 7
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_plan(planned(family), family / "out", Settings(), Impatient(), Endless)
    assert (family / "out.partial").is_dir()
    assert not (family / "out").exists()
    workers = [thread for thread in threading.enumerate() if thread.name == "merge"]
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_progress_ends_at_its_total(family: Path) -> None:
    class Recorder:
        total = 0
        seen: list[int] = []  # noqa: RUF012

        def begin(self, total: int) -> None:
            self.total = total

        def update(self, done: int) -> None:
            self.seen.append(done)

    recorder = Recorder()
    execute_plan(planned(family), family / "out", Settings(), recorder)
    assert recorder.seen[-1] == recorder.total > 0


def test_from_python(family: Path) -> None:
    recipe = family / "recipe.yml"
    recipe.write_text(recipe_text("ties", ["one", "two"], "base", density=0.5))
    plan = pymerge.plan(recipe)
    assert plan.tensors == len(SHAPES)
    summary = pymerge.merge(
        str(recipe), family / "out", threads=1, max_memory="20MB", max_shard_size="3KB", dtype="torch.float32"
    )
    assert summary.as_dict()["undecided_share"] == summary.undecided_share
    assert {ref.entry.dtype for ref in open_checkpoint(family / "out").tensors.values()} == {DType.F32}
    text = recipe_text("linear", [family / "one", family / "two"], None)
    pymerge.merge(text, family / "other")
    assert json.loads((family / "other" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_card_of_a_recipe_in_a_folder_has_its_paths(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(family)
    (family / "recipes").mkdir()
    recipe = family / "recipes" / "recipe.yml"
    recipe.write_text(recipe_text("ties", ["one", "two"], "base", density=0.5))
    pymerge.merge("recipes/recipe.yml", "out")
    card = (family / "out" / "README.md").read_text()
    assert "Base model: base\n" in card
    assert "- one\n- two\n" in card
    assert str(family) not in card
