"""The house rules that a program can check: layers, lengths, light imports, one version."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import write_checkpoint, write_recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pymerge"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("pymerge", "csrc", "kernels", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu")
)
LONGEST = 400

# Left never imports right. A prefix stands for everything below it.
LAYERS = (
    ("text", "errors", "files", "dtypes", "rule", "job", "version", "adapted", "collector", "_core"),
    (
        "parameters",
        "hub",
        "references",
        "recipe_yaml",
        "recipe_values",
        "recipe_tokenizer",
        "recipe_schema",
        "recipe",
        "sweep_settings",
    ),
    ("presets", "blending", "methods", "ruling", "explaining"),
    ("checkpoint",),
    (
        "planner",
        "plan_side",
        "plan_rule",
        "plan_layers",
        "plan_stack",
        "plan_text",
        "plan_checks",
        "plan_memory",
        "plan_vocabulary",
        "plan_inputs",
        "plan_jobs",
        "plan_optional",
        "plan_chain",
        "plan_modules",
        "plan_variants",
        "lora",
    ),
    ("kernels",),
    ("backends",),
    (
        "run",
        "options",
        "operands",
        "tensor_rule",
        "tensor_backends",
        "tensors",
        "models",
        "session",
        "verify",
        "diff",
    ),
    ("integrations",),
    ("api", "info", "demo", "demo_blend", "demo_fuse", "demo_check", "demo_family"),
    ("cli_frame", "cli"),
    ("__main__",),
)
HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "pydantic_core",
    "rich",
    "yaml",
    "huggingface_hub",
    "ml_dtypes",
    "triton",
)


def layer_of(module: str) -> int:
    """The layer of a dotted name below pymerge."""
    head = module.split(".")[0]
    for number, names in enumerate(LAYERS):
        if head in names:
            return number
    raise AssertionError(f"pymerge.{module} stands in no layer of tests/test_house.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module below pymerge that is imported anywhere in the file, types and lazy imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name[8:] for item in node.names if item.name.startswith("pymerge."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "pymerge":
                yield from (item.name for item in node.names)
            elif node.module and node.module.startswith("pymerge."):
                yield node.module[8:]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_left_never_imports_right(path: Path) -> None:
    module = name_of(path)
    if not module:
        return
    for other in imported(ast.parse(path.read_text())):
        assert layer_of(other) <= layer_of(module), f"pymerge.{module} imports pymerge.{other}"


def test_no_import_cycles() -> None:
    graph = {name_of(path): set(imported(ast.parse(path.read_text()))) for path in MODULES if name_of(path)}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for other in graph.get(module, ()):
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)) or not text.strip()


def test_nothing_of_the_environment_is_read() -> None:
    for path in MODULES:
        for line in path.read_text().splitlines():
            assert not re.search(r"\b(environ|getenv)\b", line), f"{path.name}: {line.strip()}"


def loaded_after(code: str) -> list[str]:
    """The top-level modules that a fresh interpreter has after running `code`."""
    ending = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = subprocess.run(
        [sys.executable, "-c", code + ending],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "code",
    [
        "import pymerge; pymerge.__version__; dir(pymerge)",
        "import pymerge.cli",
        "import pymerge.cli\ntry: pymerge.cli.main(['--help'])\nexcept SystemExit: pass",
        "import pymerge.cli\ntry: pymerge.cli.main(['merge', '--help'])\nexcept SystemExit: pass",
        "import pymerge.cli\ntry: pymerge.cli.main(['explain', 'ties'])\nexcept SystemExit: pass",
    ],
)
def test_starting_is_light(code: str) -> None:
    assert not set(loaded_after(code)) & set(HEAVY)


def test_commands_load_no_more_than_they_need(tmp_path: Path) -> None:
    models = [write_checkpoint(tmp_path / name, {"w": torch.ones(8)}, 1) for name in ("base", "one", "two")]
    recipe = write_recipe(tmp_path / "recipe.yml", "ties", models[1:], models[0])
    given = {"plan": [recipe], "merge": [recipe, tmp_path / "out"], "verify": [tmp_path / "out"]}
    for command, arguments in given.items():
        call = (
            f"import pymerge.cli; pymerge.cli.main({[command, *map(str, arguments)]}, standalone_mode=False)"
        )
        needed = set() if command == "verify" else {"pydantic_core", "yaml"}
        assert set(loaded_after(call)) & set(HEAVY) == needed, command


@pytest.mark.parametrize("module", ["pymerge.api", "pymerge.run.local", "pymerge.demo", "pymerge.diff"])
def test_merging_checkpoints_needs_no_torch(module: str) -> None:
    assert "torch" not in loaded_after(f"import {module}")


def test_the_package_exports_lazily_and_strictly() -> None:
    import pymerge
    from pymerge.planner import Plan

    assert pymerge.Plan is Plan
    assert all(hasattr(pymerge, name) for name in pymerge.__all__)
    assert set(pymerge.__all__) <= set(dir(pymerge))
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        _ = pymerge.merg


def test_one_version() -> None:
    from pymerge.version import VERSION

    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == VERSION
