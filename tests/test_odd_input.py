"""Odd names, odd files, odd surroundings: a sentence and exit code 2, never a traceback or a wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made import recipe_text, write_checkpoint

import pymerge
from pymerge.cli import main
from pymerge.errors import ProblemList, PymergeError
from pymerge.text import printable

ROOT = Path(__file__).resolve().parent.parent
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
EVIL = "a\x1b[31m\nb"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, seed, shards=1 + seed)
    (tmp_path / "recipe.yml").write_text(recipe_text("ties", ["one", "two"], "base", density=0.5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, *parts: str) -> list[str]:
    """The sentences on stderr; each of `parts` is in one of them."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    for part in parts:
        assert any(part in line for line in lines), (part, lines)
    return lines


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("/", "output / exists already"),
        ("loop", "output loop exists already"),
        ("loop/out", "loop is not a folder"),
    ],
)
def test_odd_outputs(command: str, out: str, part: str, family: Path) -> None:
    (family / "loop").symlink_to("loop")
    refused(call(command, "recipe.yml", out), part)


def test_names_that_no_file_can_have(family: Path) -> None:
    with pytest.raises(ProblemList, match=r"output a\\x00b cannot be the name of a folder"):
        pymerge.plan("recipe.yml", "a\0b")
    with pytest.raises(PymergeError, match=r"a\\x00b: the file cannot be opened: embedded null byte"):
        pymerge.plan("a\0b")


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("make", [fifo, folder])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("recipe.yml", ("plan", "recipe.yml")),
        ("one/config.json", ("plan", "recipe.yml")),
        ("base/tokenizer.json", ("plan", "recipe.yml")),
        ("two/model-00001-of-00003.safetensors", ("diff", "two", "two")),
        ("out.partial/merge.plan.json", ("merge", "recipe.yml", "out")),
        ("done/merge.manifest.json", ("verify", "done")),
        ("done/config.json", ("verify", "done")),
    ],
)
def test_only_regular_files_are_read(
    make: Callable[[Path], None], name: str, command: tuple[str, ...], family: Path
) -> None:
    if name.startswith("done"):
        assert call("merge", "recipe.yml", "done").exit_code == 0
    (family / "out.partial").mkdir()
    make(family / name)
    refused(call(*command), "this is not a regular file")


@pytest.mark.parametrize(
    "name", ["recipe.yml", "one/config.json", "base/tokenizer.json", "one/model.safetensors.index.json"]
)
def test_lfs_pointers_are_named(name: str, family: Path) -> None:
    (family / name).write_bytes(LFS)
    assert len(refused(call("plan", "recipe.yml"), f"{name}: this is a git-LFS pointer")) == 1


def test_half_surrogates_in_the_config_stay(family: Path) -> None:
    (family / "base" / "config.json").write_text('{"name": "\\ud800\\u00e9"}')
    assert call("merge", "recipe.yml", "out").exit_code == 0
    found = json.loads((family / "out" / "config.json").read_text())
    assert found == {"name": "\ud800é", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_recipe_headers_and_side_files_are_judged_together(command: str, family: Path) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "one", "parameters": {"wieght": 1, "density": 1.5}},
            {"model": "two", "parameters": {"weight": "much"}},
            {"model": "nowhere", "parameters": {"weight": 1}},
            {"model": {"model": {"path": 3}}},
            17,
        ],
        "dtype": "int8",
    }
    (family / "recipe.yml").write_text(json.dumps(recipe))
    (family / "base" / "config.json").write_text("{")
    (family / "one" / "model.safetensors.index.json").unlink()
    (family / "out").mkdir()
    lines = refused(
        call(command, "recipe.yml", "out"),
        "unknown key 'wieght'; did you mean weight?",
        "models[1].parameters.weight: expected a number, found text ('much')",
        "models[2].model: no such file or folder: ",
        "models[3].model.model.path: expected text, found a number (3)",
        "models[4]: expected a mapping, found a number (17)",
        "dtype: 'int8' is not a type that merges",
        "density of one is 1.5, which is outside 0 to 1",
        "ties needs a weight for models[3].model",
        "one: the folder holds shards",
        "base/config.json: the file is not JSON",
        "output out exists already",
    )
    assert len(lines) == 11


def test_scope_model_of_two_working_types_is_seen_by_the_plan(family: Path) -> None:
    from pymerge.dtypes import DType

    for name in ("base", "one", "two"):
        for path in (family / name).iterdir():
            path.unlink()
        write_checkpoint(family / name, 1, dtypes={"norm": DType.F64})
    (family / "recipe.yml").write_text(recipe_text("ties", ["one", "two"], "base", scope="model"))
    refused(call("plan", "recipe.yml"), "scope model: tensor 'norm' is computed in float64, ")


def test_nothing_raw_reaches_the_terminal(family: Path) -> None:
    (family / EVIL).mkdir()
    good = family / EVIL / "recipe.yml"
    good.write_text(recipe_text("linear", ["one", "two"], None))
    ends = [
        call("plan", family / EVIL / "none.yml"),
        call("plan", good, family / EVIL / "out"),
        call("merge", good, family / EVIL / "out"),
        call("verify", family / EVIL / "out"),
        call("verify", family / EVIL),
        call("diff", family / EVIL, "one"),
        call("explain", EVIL),
        call(EVIL),
        call("--" + EVIL),
        call("merge", good, "out", "--isa", EVIL),
    ]
    assert [end.exit_code for end in ends] == [2, 0, 0, 0, 2, 2, 2, 2, 2, 2]
    for end in ends:
        assert "\x1b" not in end.output
        assert "a\\x1b[31m" in end.output or end is ends[1]
    assert len(ends[0].stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "safe"),
    [("plain é 😀", "plain é 😀"), (EVIL, "a\\x1b[31m\\nb"), ("\udcff\u202e\x00", "\\udcff\\u202e\\x00")],
)
def test_every_error_is_printable(text: str, safe: str) -> None:
    assert printable(text) == safe
    assert str(PymergeError(text)) == safe
    assert ProblemList([text, "x"]).problems == (safe, "x")
    assert str(ProblemList([text, "x"])) == f"{safe}\nx"


def test_a_huge_tile_is_refused(family: Path) -> None:
    result = call("merge", "recipe.yml", "out", "--tile", 10**15)
    refused(result, "Invalid value for '--tile'")


def run(redirect: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = " ".join([sys.executable, "-m", "pymerge", *arguments, redirect])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, shell=True, capture_output=True, check=False, env=environment)


def test_closed_standard_streams(family: Path) -> None:
    """The descriptors 0 to 2 must not become those of the files being merged."""
    assert run("<&- >&- 2>&-", "merge", "recipe.yml", "out").returncode == 0
    assert call("verify", "out").exit_code == 0
    assert run("<&- >&- 2>&-", "merge", "recipe.yml", "out").returncode == 2


def test_a_reader_that_goes_away(family: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "pymerge", "methods"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, check=False, env=environment)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_an_interrupt_during_the_imports_is_quiet(family: Path) -> None:
    """The import of click never ends here; the module is ours."""
    (family / "click.py").write_text("import time\nopen('started', 'w').close()\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{family}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pymerge", "methods"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 30
    while not (family / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
