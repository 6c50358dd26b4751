"""Every Python example of the README runs as printed, and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import write_checkpoint

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
# What a block needs that the tests do not.
OPTIONAL = ("mergekit", "peft")


def promised(block: str) -> list[str]:
    """The comments that say what is printed: behind a print, or in the lines that follow one."""
    said, printed = [], False
    for line in block.splitlines():
        code, _, comment = line.partition("# ")
        if comment and (code.startswith("print(") or (not code and printed)):
            said.append(comment)
        printed = code.startswith("print(") or (not code and printed)
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the family and the recipe that the README starts from."""
    folder = tmp_path_factory.mktemp("readme")
    for seed, name in enumerate(("base", "expert-0", "expert-1")):
        draw = torch.Generator().manual_seed(seed)
        write_checkpoint(folder / "family" / name, {"w": torch.randn(64, 64, generator=draw)}, 1)
    recipe = re.search(r"^```yaml\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert recipe is not None
    (folder / "recipe.yml").write_text(recipe[1])
    return folder


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 4
    assert promised(BLOCKS[0]) == ["[ 4.  3. -6.  0.]"]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {k}" for k in range(len(BLOCKS))])
def test_examples_run_as_printed(block: str, place: Path) -> None:
    for tool in OPTIONAL:
        if re.search(rf"^(from|import) {tool}\b", block, re.MULTILINE) and find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for line in promised(block):
        assert line in done.stdout
