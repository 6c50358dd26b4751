"""The recipes in examples/ do what their comments say, for both tools alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from parity_explain import UNEXPLAINED, explain, ours_is_exact
from parity_family import write_family
from parity_run import EXAMPLES, OWN_EXAMPLES, SHARED_EXAMPLES, needs_mergekit, results_of

import pymerge


def named(path: Path) -> str:
    return path.stem


@needs_mergekit
@pytest.mark.parametrize("example", SHARED_EXAMPLES, ids=named)
def test_both_tools_agree(example: Path, results: Path) -> None:
    reasons: Counter[str] = Counter()
    for tensor in results_of(results, "examples", example.stem).tensors():
        assert ours_is_exact(tensor), tensor.name
        reasons += explain(tensor)
    assert UNEXPLAINED not in reasons, reasons


@pytest.mark.parametrize("example", OWN_EXAMPLES, ids=named)
def test_recipes_with_our_own_keys_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path / "family", torch.float32)
    monkeypatch.chdir(tmp_path)
    assert pymerge.merge(example, tmp_path / "out").bytes_written > 0


def test_every_example_says_what_it_shows() -> None:
    for example in EXAMPLES.glob("*.yml"):
        assert example.read_text().startswith("# "), example.name
