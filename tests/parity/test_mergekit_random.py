"""Random drops beside mergekit: its random words are its own, so distributions are compared, of both tools.

Every bound is Hoeffding's, which holds for any size, at a probability of 1e-12 for a single comparison. Fewer
than 10,000 are made, so a right implementation fails with a probability below 1e-8. (The seeds are fixed: on
one version of torch the outcome is always the same.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_explain import flat
from parity_outcomes import UNIT, Flags, outcomes
from parity_run import Merged, Numbers, needs_mergekit, setting_results

from pymerge.methods import METHODS
from pymerge.rule import Trim

pytestmark = needs_mergekit

FALSE_ALARM = 1e-12
TOOLS = ("ours", "theirs")
DRAWING = [name for name, row in METHODS.items() if row.trim.drawn]


def share_bound(count: int) -> float:
    """How far the mean of `count` draws from 0 to 1 strays from its expectation."""
    return math.sqrt(math.log(2 / FALSE_ALARM) / (2 * count))


def assert_share(drawn: Flags, expected: float) -> None:
    if drawn.size:  # a coarse tensor may hold no entry that tells
        assert abs(drawn.mean() - expected) <= share_bound(drawn.size)


def tensors_of(results: Path, method: str, number: int) -> list[Merged]:
    return list(setting_results(results, method, number, "float32").tensors())


def result(tensor: Merged, tool: str) -> Numbers:
    return flat(getattr(tensor, tool))


def kept_of_one(tensor: Merged, tool: str) -> tuple[Flags, Flags]:
    """Where the one expert's entries are large enough to tell, and whether they were kept there."""
    assert tensor.base is not None
    telling = np.abs(tensor.experts[0] - tensor.base) > 64 * UNIT * np.abs(tensor.base)
    return telling, result(tensor, tool) != tensor.base


def kept_of_two(tensor: Merged, tool: str) -> tuple[Flags, Flags, Flags]:
    """Where two experts' entries can be told apart, and whether each was kept there."""
    assert tensor.base is not None
    rule, moved = tensor.rule, result(tensor, tool) - tensor.base
    terms = [
        rule.lambda_ * w * (x - tensor.base) / density
        for x, w, density in zip(tensor.experts, rule.weights, rule.densities, strict=True)
    ]
    subsets = list(itertools.product((0, 1), repeat=2))
    values = np.stack([a * terms[0] + b * terms[1] for a, b in subsets])
    apart = np.min([np.abs(x - y) for x, y in itertools.combinations(values, 2)], axis=0)
    # L1 sums set the factor of a rescale, so it is not exactly 1 / density.
    telling = apart > 0.15 * (np.abs(terms[0]) + np.abs(terms[1]))
    found = np.array(subsets)[np.abs(values - moved).argmin(axis=0)].astype(bool)
    return telling, found[:, 0], found[:, 1]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_kept_share(tool: str, results: Path) -> None:
    for tensor in tensors_of(results, "dare_linear", 0):
        telling, kept = kept_of_one(tensor, tool)
        assert_share(kept[telling], tensor.rule.densities[0])


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_kept_is_rescaled_to_the_same_l1_norm(tool: str, results: Path) -> None:
    for tensor in tensors_of(results, "dare_linear", 0):
        assert tensor.base is not None
        delta = tensor.experts[0] - tensor.base
        telling, kept = kept_of_one(tensor, tool)
        factor = math.fsum(np.abs(delta)) / (math.fsum(np.abs(delta[kept])) or 1.0)
        wanted = tensor.base + factor * delta
        # 1e-5: entries too small to tell belong to neither sum for certain.
        off = (
            np.abs(result(tensor, tool) - wanted) - 1e-5 * factor * np.abs(delta) - 8 * UNIT * np.abs(wanted)
        )
        assert (off[telling & kept] <= 0).all(), tensor.name


@pytest.mark.parametrize("tool", TOOLS)
def test_experts_are_drawn_independently(tool: str, results: Path) -> None:
    compared = 0
    for tensor in tensors_of(results, "dare_linear", 1):
        if tensor.ours.numel() < 1000:
            continue  # its L1 sums stray too far
        telling, first, second = kept_of_two(tensor, tool)
        p, q = tensor.rule.densities
        compared += int(telling.sum())
        for wanted, drawn in ((p, first), (q, second), (p * q, first & second)):
            assert_share(drawn[telling], wanted)
    assert compared > 10_000


def agreements(masks: Sequence[tuple[Flags, Flags]], density: float) -> None:
    """Any two masks agree as often as independent ones do."""
    for (tells, kept), (also_tells, other) in itertools.combinations(masks, 2):
        both = tells & also_tells
        assert_share((kept == other)[both], density**2 + (1 - density) ** 2)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", ["q_proj.weight", "up_proj.weight", "k_proj.weight", "input_layernorm"])
def test_tensors_are_drawn_independently(tool: str, name: str, results: Path) -> None:
    tensors = [tensor for tensor in tensors_of(results, "dare_linear", 0) if name in tensor.name]
    assert len(tensors) == 4
    agreements([kept_of_one(tensor, tool) for tensor in tensors], tensors[0].rule.densities[0])


def test_both_draw_words_of_their_own(results: Path) -> None:
    """Equal masks would mean that the comparison of distributions compares a tool with itself."""
    for tensor in tensors_of(results, "dare_linear", 0):
        agreements([kept_of_one(tensor, tool) for tool in TOOLS], tensor.rule.densities[0])


def chances(tensor: Merged) -> Numbers | None:
    """The chance that each entry is kept, for every expert; None where equal magnitudes leave ranks open."""
    assert tensor.base is not None
    rule, found = tensor.rule, []
    for k, x in enumerate(tensor.experts):
        size = np.abs(x - tensor.base)
        chance = np.full(size.shape, rule.densities[k])
        if rule.trim is Trim.RANKED:
            rows = size.reshape(-1, tensor.ours.shape[-1])
            ascending = np.sort(rows, axis=1)
            if ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] > 0)).any():
                return None
            rank = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1).ravel()
            chance += rule.epsilons[k] * (2 * rank / (rows.shape[1] - 1) - 1)
        found.append(chance)
    return np.array(found)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("method", DRAWING)
def test_the_mean_of_the_results(method: str, tool: str, results: Path) -> None:
    """Over all draws: the sum of a tensor's elements, each turned to where its task vectors push it."""
    compared = 0
    for tensor in tensors_of(results, method, 3):
        share = chances(tensor)
        if share is None:
            continue
        assert tensor.base is not None
        expected = np.zeros(tensor.base.shape)
        low, high = np.full(expected.shape, np.inf), np.full(expected.shape, -np.inf)
        drawn = [outcome for outcome in outcomes(tensor) if outcome.reason == "random drop"]
        for outcome, kept in zip(drawn, itertools.product((False, True), repeat=len(share)), strict=True):
            own = [p if keep else 1 - p for p, keep in zip(share, kept, strict=True)]
            expected += np.prod(own, axis=0) * outcome.value
            low, high = np.minimum(low, outcome.value), np.maximum(high, outcome.value)
        turn = np.sign(expected - tensor.base)
        strayed = abs(math.fsum(turn * (result(tensor, tool) - expected)))
        bound = math.sqrt(math.log(2 / FALSE_ALARM) / 2 * math.fsum((high - low) ** 2))
        rounding = 8 * UNIT * math.fsum(np.maximum(np.abs(low), np.abs(high)))
        assert strayed <= bound + rounding, tensor.name
        compared += tensor.base.size
    assert compared > 50_000


@pytest.mark.parametrize("tool", TOOLS)
def test_larger_entries_are_kept_more_often(tool: str, results: Path) -> None:
    """The kept share of each quarter of the chances that della gives; pooled over the tensors."""
    shares, draws = [], []
    for tensor in tensors_of(results, "della_linear", 0):
        share = chances(tensor)
        if share is not None:
            telling, kept = kept_of_one(tensor, tool)
            shares.append(share[0][telling])
            draws.append(kept[telling])
    share, kept = np.concatenate(shares), np.concatenate(draws)
    for part in np.array_split(np.argsort(share), 4):
        assert abs(kept[part].mean() - share[part].mean()) <= share_bound(part.size)
    assert share.max() - share.min() > 0.2


@pytest.mark.parametrize("tool", TOOLS)
def test_another_density_would_be_noticed(tool: str, results: Path) -> None:
    tensor = max(tensors_of(results, "dare_linear", 0), key=lambda found: found.ours.numel())
    telling, kept = kept_of_one(tensor, tool)
    with pytest.raises(AssertionError):
        assert_share(kept[telling], tensor.rule.densities[0] + 0.06)


def test_the_same_words_for_two_tensors_would_be_noticed() -> None:
    mask = torch.rand(4096, generator=torch.Generator().manual_seed(1)).numpy() < 0.3
    with pytest.raises(AssertionError):
        agreements([(np.ones(4096, bool), mask), (np.ones(4096, bool), mask)], 0.3)
