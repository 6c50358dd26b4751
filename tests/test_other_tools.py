"""The examples for other tools' users, beside small formulas of what those tools compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> Any:
    """The example as a module, from its file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ties(vectors: torch.Tensor, keep: float, mean: bool) -> torch.Tensor:
    """The paper over flat vectors: trim at the order statistic, elect by mass, merge what agrees."""
    size = vectors.shape[1]
    magnitudes = vectors.abs()
    threshold = magnitudes.sort(dim=1).values[:, size - int(size * keep) - 1]
    trimmed = vectors * (magnitudes >= threshold[:, None])
    agreeing = trimmed * (trimmed * trimmed.sum(0).sign() > 0)
    total = agreeing.sum(0)
    return total / agreeing.count_nonzero(0).clamp(min=1) if mean else total


@pytest.mark.parametrize(("merge_func", "mean"), [("dis-mean", True), ("dis-sum", False)])
@pytest.mark.parametrize(("given", "keep"), [(20, 0.2), (0.37, 0.37)])
def test_the_paper_s_function(given: float, keep: float, merge_func: str, mean: bool) -> None:
    vectors = torch.randn(4, 5003, generator=torch.Generator().manual_seed(1))
    merged = load("ties_merging").ties_merging(vectors, given, merge_func)
    expected = ties(vectors.double(), keep, mean)
    assert torch.allclose(merged.double(), expected, rtol=0, atol=1e-6)


def test_the_paper_keeps_one_entry_more() -> None:
    vectors = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    for row in vectors:
        alone = load("ties_merging").ties_merging(row[None], 20)
        assert alone.count_nonzero() == 201


@pytest.mark.parametrize(("merge_func", "mean"), [("mean", True), ("sum", False)])
def test_fusionbench(merge_func: str, mean: bool) -> None:
    def model(seed: int) -> torch.nn.Sequential:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 7))

    names = ["a", "b", "c"]
    models = {name: model(k) for k, name in enumerate(["_pretrained_", *names])}
    before = {name: [x.clone() for x in m.parameters()] for name, m in models.items()}
    pool = SimpleNamespace(model_names=names, load_model=models.__getitem__)
    removed = ["1.running_mean", "1.running_var"]
    merged = load("fusionbench_ties").TiesMerging(0.4, 30, removed, merge_func).run(pool)
    assert merged is models["_pretrained_"]

    # FusionBench flattens by the sorted names, of which the order decides nothing here.
    flat = {
        name: torch.cat([x.double().reshape(-1) for x in tensors]).detach()
        for name, tensors in before.items()
    }
    vectors = torch.stack([flat[name] - flat["_pretrained_"] for name in names])
    expected = flat["_pretrained_"] + 0.4 * ties(vectors, 0.3, mean)
    found = torch.cat([x.double().reshape(-1) for x in merged.parameters()])
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_what_they_do_not_take() -> None:
    with pytest.raises(ValueError, match="merge_func is 'max'"):
        load("fusionbench_ties").TiesMerging(merge_func="max")
    with pytest.raises(ValueError, match="merge_func is 'dis-max'"):
        load("ties_merging").ties_merging(torch.ones(2, 3), 20, "dis-max")
