"""Slices of which some sources lack tensors: merged from those that have them, as without slices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import read_checkpoint, write_checkpoint
from torch import Tensor

import pymerge
from pymerge.errors import PymergeError

LAYERS = 3


def write_model(path: Path, seed: int, biased: Sequence[int]) -> dict[str, Tensor]:
    """A model of three layers, some of which have a bias."""
    g = torch.Generator().manual_seed(seed)
    names = ["embed_tokens.weight", *(f"layers.{n}.up.weight" for n in range(LAYERS))]
    names += [f"layers.{n}.up.bias" for n in biased]
    tensors = {name: torch.randn(40, generator=g) for name in names}
    write_checkpoint(path, tensors, 1)
    return tensors


def merged(folder: Path, method: str, *slices: dict[str, Any], **top: Any) -> dict[str, Tensor]:
    text = json.dumps({"merge_method": method, "slices": list(slices), **top}, indent=1)
    pymerge.merge(text, folder / "out")
    return read_checkpoint(folder / "out")


def source(path: Path, begin: int, end: int, weight: float = 1.0) -> dict[str, Any]:
    return {"model": str(path), "layer_range": [begin, end], "parameters": {"weight": weight}}


def test_an_average_is_of_the_sources_that_have_it(tmp_path: Path) -> None:
    """The sources give other layers, so that one name means different things in each."""
    one, two = tmp_path / "one", tmp_path / "two"
    a, b = write_model(one, 1, [0, 1]), write_model(two, 2, [1, 2])
    first = {"sources": [source(one, 0, 2), source(two, 1, 3, 2.0)]}
    second = {"sources": [source(one, 1, 3), source(two, 0, 2, 2.0)]}
    found = merged(tmp_path, "linear", first, second)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return (x + 2 * y) / 3

    assert torch.equal(found["layers.0.up.bias"], mean(a["layers.0.up.bias"], b["layers.1.up.bias"]))
    assert torch.equal(found["layers.1.up.bias"], mean(a["layers.1.up.bias"], b["layers.2.up.bias"]))
    assert torch.equal(found["layers.2.up.bias"], a["layers.1.up.bias"])  # two lacks that of its layer 0
    assert torch.equal(found["layers.3.up.bias"], b["layers.1.up.bias"])  # one lacks that of its layer 2
    assert torch.equal(found["layers.3.up.weight"], mean(a["layers.2.up.weight"], b["layers.1.up.weight"]))
    assert len(found) == 1 + 4 + 4


def test_the_base_stays_where_no_expert_has_it_and_the_plan_says_so(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    a = write_model(one, 1, [0])
    write_model(two, 2, [])
    part = {"sources": [source(one, 0, 3), source(two, 0, 3)]}
    found = merged(tmp_path, "task_arithmetic", part, base_model=str(one))
    assert torch.equal(found["layers.0.up.bias"], a["layers.0.up.bias"])
    text = json.dumps({"merge_method": "task_arithmetic", "slices": [part], "base_model": str(one)}, indent=1)
    note = f"tensor 'layers.0.up.bias', which expert {two} lacks: each is base {one}'s"
    assert note in pymerge.plan(text).notes


def test_what_is_not_optional_must_be_in_every_source(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_model(one, 1, [])
    tensors = {name: x for name, x in write_model(tmp_path / "whole", 2, []).items() if "1.up" not in name}
    write_checkpoint(two, {**tensors, "layers.1.down.weight": torch.zeros(3)}, 1)
    with pytest.raises(PymergeError, match="that other sources of its slice have"):
        merged(tmp_path, "linear", {"sources": [source(one, 0, 3), source(two, 0, 3)]})
    write_model(tmp_path / "three", 3, [0])
    part = {"sources": [source(one, 0, 3), source(tmp_path / "three", 0, 3)]}
    with pytest.raises(PymergeError, match=r"task_arithmetic cannot merge tensor 'layers\.0\.up\.bias'"):
        merged(tmp_path, "task_arithmetic", part, base_model=str(one))
