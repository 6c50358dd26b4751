"""The command line: what it prints, what it exits with, and that trouble is one sentence on stderr."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made import SHAPES, recipe_text, write_checkpoint

from pymerge.cli import main
from pymerge.methods import METHODS
from pymerge.run.progress import Bar

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shards=1 + seed)
    (tmp_path / "recipe.yml").write_text(recipe_text("ties", ["one", "two"], "base", density=0.5))
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pymerge", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_merge_prints_what_it_did(family: Path) -> None:
    result = call("merge", family / "recipe.yml", family / "out")
    assert result.exit_code == 0
    assert f"{family}/out: {len(SHAPES)} tensors of 2 experts merged by ties" in result.stdout
    assert result.stderr == ""
    assert (family / "out" / "merge.manifest.json").is_file()


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_result_that_cannot_be_printed_is_there_all_the_same(
    options: tuple[str, ...], family: Path
) -> None:
    named = [str(family / name) for name in ("recipe.yml", "out")]
    command = [sys.executable, "-m", "pymerge", "merge", *named, *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    sentence = "is complete, but what was done cannot be printed: No space left on device"
    assert done.stderr == f"pymerge: {family}/out {sentence}\n"
    assert call("verify", family / "out").exit_code == 0


def test_of_very_many_problems_the_first_are_shown(family: Path) -> None:
    (family / "many.yml").write_text("merge_method: ties\nmodels:\n" + "- model: gone\n" * 5000)
    result = call("plan", family / "many.yml")
    lines = result.stderr.splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("pymerge: models[0].model: no such file or folder")
    assert lines[-1].startswith("pymerge: and ")
    assert lines[-1].endswith(" more problems")


def test_merge_as_json(family: Path) -> None:
    result = call(
        "merge", family / "recipe.yml", family / "out", "--json", "--threads", 2, "--max-shard-size", "3KB"
    )
    found = json.loads(result.stdout)
    for name in ("seconds", "bytes_read", "bytes_written", "peak_memory", "tensors", "undecided_share"):
        assert found[name] >= 0
    assert (found["fallbacks"] >= 0, found["nan_outputs"], found["shards"] > 1) == (True, 0, True)


def test_quiet_is_quiet_and_notes_are_not(family: Path) -> None:
    (family / "recipe.yml").write_text(recipe_text("linear", ["one", "two"], None, density=0.5))
    loud = call("merge", family / "recipe.yml", family / "a")
    assert "note: density has no effect with linear" in loud.stderr
    quiet = call("merge", family / "recipe.yml", family / "b", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


@pytest.mark.parametrize(("isa", "tile"), [("scalar", 1024), ("auto", 4096)])
def test_hidden_settings_change_nothing(isa: str, tile: int, family: Path) -> None:
    call("merge", family / "recipe.yml", family / "plain")
    result = call(
        "merge", family / "recipe.yml", family / "out", "--isa", isa, "--tile", tile, "--max-memory", "9MB"
    )
    assert result.exit_code == 0
    name = "model.safetensors"
    assert (family / "out" / name).read_bytes() == (family / "plain" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--isa", "mmx"), "--isa mmx is not known; known are auto, scalar,"),
        (("--dtype", "int8"), "pymerge: 'int8' is not a type that merges; known are float64, float32,"),
        (("--max-shard-size", "5XB"), "pymerge: '5XB' is not a size"),
        (("--max-memory", "lots"), "pymerge: 'lots' is not a size"),
        (("--max-memory", "1KB"), "pymerge: 1,000 bytes of memory are too little"),
        (("--threads", "0"), "Invalid value for '--threads'"),
        (("--backend", "tpu"), "Invalid value for '--backend'"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], sentence: str, family: Path) -> None:
    result = call("merge", family / "recipe.yml", family / "out", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (family / "out").exists()


def test_every_problem_is_a_line_on_stderr(family: Path) -> None:
    (family / "one" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    (family / "out").mkdir()
    for command in ("merge", "plan"):
        result = call(command, family / "recipe.yml", family / "out")
        assert (result.exit_code, result.stdout) == (2, "")
        lines = result.stderr.splitlines()
        assert len(lines) == 2
        assert all(line.startswith("pymerge: ") for line in lines)
    assert list((family / "out").iterdir()) == []
    assert not (family / "out.partial").exists()


def test_trouble_has_no_traceback(family: Path) -> None:
    process = start("merge", family / "none.yml", family / "out")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == f"pymerge: {family}/none.yml: the file does not exist\n"


def test_plan(family: Path) -> None:
    result = call("plan", family / "recipe.yml", family / "out", "--threads", 3)
    assert result.exit_code == 0
    assert "method       ties, scope tensor" in result.stdout
    assert "bytes for 3 threads" in result.stdout
    assert "with a GPU backend" in result.stdout
    found = json.loads(call("plan", family / "recipe.yml", "--json").stdout)
    assert found["tensors"] == len(SHAPES)
    assert found["memory_with_gpu"] == found["memory"] + (64 << 20)
    assert found["memory"] > 0
    assert not (family / "out").exists()


def test_methods_and_explain() -> None:
    listed = call("methods").stdout
    for name, row in METHODS.items():
        assert f"{name:<16} {row.summary}" in listed
        explained = call("explain", name)
        assert (explained.exit_code, explained.stdout.startswith(f"{name}: ")) == (0, True)
    unknown = call("explain", "teis")
    assert (unknown.exit_code, "did you mean ties?" in unknown.stderr) == (2, True)


def test_a_backend_that_is_not_there(family: Path) -> None:
    """No card, no kernels or no torch: one sentence, whichever it is."""
    found = json.loads(call("info", "--json").stdout)["merge --backend"]
    assert found[0] == "cpu"
    for entry in found[1:]:
        name, state = entry.removesuffix(")").split(" (", 1)
        if state != "ready":
            done = call("merge", family / "recipe.yml", family / "out", "--backend", name)
            assert done.exit_code == 2
            assert state in done.stderr
            assert not list(family.glob("out*"))


def test_info() -> None:
    found = json.loads(call("info", "--json").stdout)
    assert found["cores"] >= 1
    assert "scalar" in found["instruction sets"]
    assert "cpu" in found["backends"]
    assert ("triton" in found["backends"]) == (find_spec("triton") is not None)
    assert "instruction sets" in call("info").stdout


def test_verify(family: Path) -> None:
    out = family / "out"
    call("merge", family / "recipe.yml", out)
    assert call("verify", out).exit_code == 0
    assert json.loads(call("verify", out, "--json").stdout)["intact"] is True
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with (out / "config.json").open("a") as file:
        file.write(" ")
    (out / "README.md").unlink()
    result = call("verify", out)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"pymerge: {out}/README.md: the file does not exist"
    assert lines[1].startswith(f"pymerge: {out}/config.json has ")
    assert lines[2].startswith(f"pymerge: {weights} differs: sha256 is ")


def test_verify_knows_weights_that_somebody_added(family: Path) -> None:
    out = family / "out"
    call("merge", family / "recipe.yml", out)
    (out / "notes.txt").write_text("mine")
    assert "4 files verified" in call("verify", out).stdout
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (out / name).write_text("{}")
    result = call("verify", out)
    assert result.exit_code == 2
    starts = [line.split(": a reader")[0] for line in result.stderr.splitlines()]
    assert starts == [
        f"pymerge: {out}/model-00002-of-00002.safetensors is not in merge.manifest.json",
        f"pymerge: {out}/model.safetensors.index.json is not in merge.manifest.json",
    ]


@pytest.mark.parametrize(
    ("manifest", "part"),
    [
        (None, "has no merge.manifest.json, so it is no finished merge"),
        ("{", "the file is not JSON"),
        ("[]", "the JSON is not an object"),
        ('{"files": {"a": {}}}', "is not a manifest"),
        ("{}", "is not a manifest: it has no list of files"),
        ('{"files": {}}', "is not a manifest: it lists no weights"),
        ('{"files": {"\\ud800": {"size": 0, "sha256": ""}}}', "lists '\\ud800', which is not a file name"),
        ('{"files": {"../x": {"size": 0, "sha256": ""}}}', "lists '../x', which is not a file name"),
        ('{"files": {"x": {"size": true, "sha256": ""}}}', "lists 'x' without size and sha256"),
    ],
)
def test_verify_of_what_is_no_merge(manifest: str | None, part: str, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "merge.manifest.json").write_text(manifest)
    result = call("verify", tmp_path)
    assert result.exit_code == 2
    assert part in result.stderr


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo on a family of one layer; and that it fails when one result is wrong."""
    from pymerge import demo, demo_check, demo_family

    monkeypatch.setattr(demo_family, "LAYERS", 1)
    monkeypatch.setattr(demo_family, "HIDDEN", 32)
    monkeypatch.setattr(demo_family, "INNER", 48)
    monkeypatch.setattr(demo_family, "VOCABULARY", 300)
    result = call("demo", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[-1] for row in rows if row[0] in METHODS] == ["yes"] * len(METHODS)
    assert (tmp_path / "demo" / "merged-ties" / "merge.manifest.json").is_file()
    again = call("demo", tmp_path / "demo")
    assert (again.exit_code, "is not an empty folder" in again.stderr) == (2, True)
    right = demo_check.expected
    monkeypatch.setattr(demo, "expected", lambda *a: right(*a) ^ 1 if a[0].method == "ties" else right(*a))
    wrong = call("demo")
    assert wrong.exit_code == 1
    assert "some results are WRONG" in wrong.stdout


@pytest.mark.parametrize("gap", [None, 0.0, 0.01])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_merge_tidily(
    number: signal.Signals, code: int, gap: float | None, tmp_path: Path
) -> None:
    """The staging folder appears, the signal comes, and the same command then finishes the work."""
    shapes = {f"t{n}": (1000, 2000) for n in range(4)}
    for seed, name in enumerate(("base", "one", "two", "three")):
        write_checkpoint(tmp_path / name, seed, shapes=shapes)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(recipe_text("dare_ties", ["one", "two", "three"], "base", density=0.5))
    command = (
        "merge",
        recipe,
        tmp_path / "out",
        "--threads",
        1,
        "--isa",
        "scalar",
        "--max-shard-size",
        "9MB",
    )
    process = start(*command)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial").glob("*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the merge ended before the signal"
        time.sleep(0.001)
    process.send_signal(number)
    if gap is not None:  # an impatient user; the process may be gone by then
        time.sleep(gap)
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    word = "interrupted" if number is signal.SIGINT else "terminated"
    assert err == f"pymerge: {word}; the same command continues it\n"
    assert not (tmp_path / "out").exists()
    assert call(*command).exit_code == 0
    assert call("verify", tmp_path / "out").exit_code == 0


def test_the_bar_is_only_for_terminals(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream, Bar(stream) as bar:
        bar.begin(100)
        bar.update(50)
    assert (tmp_path / "log").read_text() == ""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, Bar(stream) as bar:
        bar.begin(100_000_000)
        bar.update(50_000_000)
        bar.update(100_000_000)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "merging" in shown
    assert "100" in shown
