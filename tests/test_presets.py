"""Presets: each beside a small computation of what its authors' code does, and beside PEFT itself."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Group
from families import Tensors, read_checkpoint, write_checkpoint, write_recipe
from harness import ISAS, assert_same_bits, run_native
from numpy.typing import NDArray
from oracle import keep_masks

import pymerge
from pymerge.backends import reference
from pymerge.backends.native import Settings
from pymerge.errors import BackendError, PymergeError
from pymerge.methods import METHODS
from pymerge.parameters import Preset
from pymerge.presets import PRESETS, defaults_of
from pymerge.rule import Rule, Scope, ThresholdTies, check_rule
from pymerge.ruling import rule_for

Numbers = NDArray[np.float64]

SHAPES = {"a.weight": (40, 50), "b.bias": (33,), "c.weight": (300, 70)}
EXPERTS = 3
PEFT_WEIGHTS = ([1.0] * 3, [0.4] * 3, [-0.7] * 3, [0.4, -0.7, 1.3])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensors]]:
    """A base and three experts in float32; the base first."""
    folder = tmp_path_factory.mktemp("presets")
    g = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    models = [base]
    for _ in range(EXPERTS):
        models.append({name: x + 0.1 * torch.randn(x.shape, generator=g) for name, x in base.items()})
    for k, model in enumerate(models):
        write_checkpoint(folder / f"model{k}", model, 1)
    return folder, models


def merged(
    family: tuple[Path, list[Tensors]],
    out: Path,
    preset: str,
    method: str,
    weights: Sequence[float],
    **parameters: object,
) -> tuple[Tensors, pymerge.Plan]:
    """What a recipe with this preset gives, and its plan; `weights`: of the experts, or none."""
    paths = [family[0] / f"model{k}" for k in range(EXPERTS + 1)]
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    recipe = out.parent / "recipe.yml"
    write_recipe(recipe, method, paths[1:], paths[0], given, own(weights), preset=preset)
    pymerge.merge(recipe, out)
    return read_checkpoint(out), pymerge.plan(recipe)


def own(weights: Sequence[float]) -> list[dict[str, float]]:
    """What each expert's entry of a recipe says."""
    return [{"weight": weight} for weight in weights] or [{}] * EXPERTS


def flattened(models: list[Tensors]) -> Numbers:
    """The models one by one, their tensors in the order of their names."""
    return np.stack([np.concatenate([m[n].double().numpy().ravel() for n in sorted(m)]) for m in models])


def assert_near(result: Tensors, wanted: Numbers) -> None:
    np.testing.assert_allclose(flattened([result])[0], wanted, rtol=0, atol=2e-6)


def ties_of_the_authors(models: list[Tensors], keep: float, lambda_: float, mean: bool) -> Numbers:
    """TIES over the whole flat model: |x| at or above the (d - int(d K))-th smallest, elect, mean or sum."""
    flat = flattened(models)
    base = flat[0]
    deltas = (flat[1:].astype(np.float32) - base.astype(np.float32)).astype(np.float64)
    size = deltas.shape[1]
    rank = size - int(size * keep)
    thresholds = np.sort(np.abs(deltas), axis=1)[:, rank - 1]
    trimmed = np.where(np.abs(deltas) >= thresholds[:, None], deltas, 0)
    assert (np.count_nonzero(trimmed, axis=1) == int(size * keep) + 1).all()
    agreeing = trimmed * (trimmed * np.sign(trimmed.sum(0)) > 0)
    count = np.maximum(1, np.count_nonzero(agreeing, axis=0)) if mean else 1
    return np.asarray(base + lambda_ * agreeing.sum(0) / count)


@pytest.mark.parametrize("density", [None, 0.2, 0.63])
@pytest.mark.parametrize(("preset", "lambda_", "mean"), [("paper", 1.0, True), ("fusionbench", 0.3, False)])
def test_ties_of_the_authors(
    family: tuple[Path, list[Tensors]],
    tmp_path: Path,
    preset: str,
    lambda_: float,
    mean: bool,
    density: float | None,
) -> None:
    given = {} if density is None else {"density": density}
    result, plan = merged(family, tmp_path / "out", preset, "ties", (), **given)
    assert_near(result, ties_of_the_authors(family[1], density or 0.2, lambda_, mean))
    assert plan.rules[0].scope is Scope.MODEL
    assert any("cancel exactly" in note for note in plan.notes)
    assert f"ties, preset {preset}" in plan.describe()


def test_parameters_win_over_a_preset(family: tuple[Path, list[Tensors]], tmp_path: Path) -> None:
    given = {"scope": "tensor", "threshold_ties": "first", "lambda_": 0.5, "normalize": True, "weight": 2}
    _, plan = merged(family, tmp_path / "out", "fusionbench", "ties", (), **given)
    rule = plan.rules[0]
    assert (rule.scope, rule.threshold_ties) == (Scope.TENSOR, ThresholdTies.FIRST)
    assert (rule.lambda_, rule.normalize, rule.weights) == (0.5, True, (2.0,) * EXPERTS)
    assert rule.one_more


def ties_of_peft(deltas: Numbers, weights: Numbers, masks: NDArray[np.bool_]) -> Numbers:
    """The sign of the unweighted sum; the weighted sum of what agrees over its count."""
    trimmed = deltas * masks
    side = np.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agreeing = np.where(np.sign(trimmed) == side, trimmed, 0)
    return np.asarray(
        (weights[:, None] * agreeing).sum(0) / np.maximum(1, np.count_nonzero(agreeing, axis=0))
    )


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
@pytest.mark.parametrize("weights", PEFT_WEIGHTS)
def test_methods_of_peft(
    family: tuple[Path, list[Tensors]], tmp_path: Path, method: str, weights: list[float]
) -> None:
    density = 0.37
    result, _ = merged(family, tmp_path / "out", "peft", method, weights, density=density)
    for name, base in family[1][0].items():
        deltas = np.stack([(m[name] - base).double().numpy().ravel() for m in family[1][1:]])
        rule = rule_for(METHODS[method], weights=[1.0] * EXPERTS, densities=[density] * EXPERTS)
        masks = np.array(keep_masks([name], [[list(map(float, d)) for d in deltas]], rule)[0])
        if method != "ties":
            deltas = deltas / density
        moved = ties_of_peft(deltas, np.array(weights), masks)
        if method == "dare_linear":
            moved = (np.array(weights)[:, None] * deltas * masks).sum(0)
        wanted = base.double().numpy().ravel() + moved
        np.testing.assert_allclose(result[name].double().numpy().ravel(), wanted, rtol=0, atol=2e-6)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed: pip install '.[parity]'")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("weights", PEFT_WEIGHTS)
def test_beside_peft(
    family: tuple[Path, list[Tensors]], tmp_path: Path, method: str, weights: list[float]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not ours to mend
        from peft.utils import merge_utils
    given = {"density": 0.37} if method == "ties" else {}
    result, _ = merged(family, tmp_path / "out", "peft", method, weights, **given)
    for name, base in family[1][0].items():
        deltas = [model[name] - base for model in family[1][1:]]
        theirs = getattr(merge_utils, method)(deltas, torch.tensor(weights), **given)
        off = (result[name] - (base + theirs)).abs() > 2e-6
        # PEFT may keep any of the entries that equal a threshold.
        assert not (off & ~at_a_threshold(deltas, given.get("density", 1.0))).any(), name


def at_a_threshold(deltas: list[torch.Tensor], density: float) -> torch.Tensor:
    """Where some task vector has the smallest magnitude that it keeps, if it has that more than once."""
    found = torch.zeros(deltas[0].shape, dtype=torch.bool)
    for size in (d.abs() for d in deltas):
        equal = size == size.flatten().sort(descending=True).values[int(density * size.numel()) - 1]
        found |= equal & (equal.sum() > 1)
    return found


def test_dare_divides_by_the_density(family: tuple[Path, list[Tensors]], tmp_path: Path) -> None:
    _, plan = merged(family, tmp_path / "out", "paper", "dare_linear", (), density=0.25)
    assert plan.rules[0].weights == (4.0,) * EXPERTS
    assert not plan.rules[0].rescale
    assert plan.passes == 1
    _, plan = merged(family, tmp_path / "again", "paper", "dare_linear", (), density=0.25, rescale=True)
    assert plan.rules[0].weights == (1.0,) * EXPERTS
    assert plan.rules[0].rescale


@pytest.mark.parametrize(
    ("preset", "method", "each", "sentence"),
    [
        ("paper", "dare_ties", {}, "preset paper: dare_ties trims twice there"),
        ("fusionbench", "dare_ties", {}, "preset fusionbench: dare_ties trims twice there"),
        ("peft", "karcher", {}, "preset peft has no karcher; it has task_arithmetic, ties"),
        ("peft", "ties", {"weight": [1, 1e39]}, "weight of "),
        ("peft", "dare_ties", {"density": [0.1, 0.2]}, "preset peft: densities that differ between experts"),
        ("peft", "ties", {}, "ties needs a weight for"),
    ],
)
def test_what_a_preset_cannot_do(
    family: tuple[Path, list[Tensors]],
    tmp_path: Path,
    preset: str,
    method: str,
    each: dict[str, list[float]],
    sentence: str,
) -> None:
    paths = [family[0] / f"model{k}" for k in range(3)]
    silent = {} if sentence.startswith("ties needs") else {"weight": 1.0}
    own = [silent | {name: values[k] for name, values in each.items()} for k in range(2)]
    recipe = write_recipe(tmp_path / "r.yml", method, paths[1:], paths[0], None, own, preset=preset)
    with pytest.raises(PymergeError) as caught:
        pymerge.plan(recipe)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "method", "options"),
    [
        ("paper", "ties", {}),
        ("paper", "linear", {}),
        ("fusionbench", "ties", {"density": 0.3, "lambda": 0.4}),
        ("fusionbench", "ties", {"scope": "tensor", "threshold_ties": "first"}),
        ("peft", "ties", {"density": 0.3, "weight": [0.6, -0.2, 1.0]}),
        ("peft", "dare_linear", {"density": 0.3, "weight": [0.6, 0.5, 0.1], "seed": 5}),
        ("peft", "dare_ties", {"density": 0.3, "weight": [0.6] * 3, "normalize": False}),
    ],
)
def test_in_memory_they_mean_the_same(
    family: tuple[Path, list[Tensors]], tmp_path: Path, preset: str, method: str, options: dict[str, Any]
) -> None:
    paths = [family[0] / f"model{k}" for k in range(EXPERTS + 1)]
    seed = {"seed": options["seed"]} if "seed" in options else {}
    given = {name: value for name, value in options.items() if name not in ("seed", "weight")}
    each = own(options.get("weight", ()))
    recipe = write_recipe(tmp_path / "r.yml", method, paths[1:], paths[0], given, each, preset=preset, **seed)
    pymerge.merge(recipe, tmp_path / "out")
    named: dict[str, Any] = {{"lambda": "lambda_"}.get(name, name): value for name, value in options.items()}
    base, *experts = family[1]
    if method == "linear":  # in a recipe a base is one more model
        found = pymerge.merge_tensors(None, [*experts, base], method=method, preset=preset)
    else:
        found = pymerge.merge_tensors(base, experts, method=method, preset=preset, **named)
    expected = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_memory_they_refuse_the_same() -> None:
    base, experts = torch.zeros(9), [torch.ones(9), -torch.ones(9)]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"preset": "peft", "weight": [1, 1e39]}, "weight of expert 1 is 1e"),
        ({"preset": "peft", "method": "dare_ties", "density": [0.1, 0.2]}, "densities that differ"),
        ({"preset": "paper", "method": "dare_ties"}, "dare_ties trims twice there"),
    ]
    for options, sentence in wrong:
        with pytest.raises(PymergeError, match=sentence):
            pymerge.merge_tensors(base, experts, **options)


def test_every_preset_names_methods_that_exist() -> None:
    assert set(PRESETS) == set(Preset) - {Preset.MERGEKIT}
    for preset, rows in PRESETS.items():
        assert rows.keys() <= METHODS.keys()
        assert all(defaults_of(preset, name) == row for name, row in rows.items())


def one_more(density: float, ties: ThresholdTies, scope: Scope) -> Rule:
    return rule_for(
        METHODS["ties"],
        weights=[1.0, 0.5],
        densities=[density] * 2,
        threshold_ties=ties,
        scope=scope,
        one_more=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ties", "scope"), list(itertools.product(ThresholdTies, Scope)))
def test_one_more_is_kept_with_the_reference_s_bits(
    dtype: torch.dtype, ties: ThresholdTies, scope: Scope
) -> None:
    g = torch.Generator().manual_seed(9)
    for sizes, density in (((1, 2), 0.4), ((17,), 0.999), ((70_000, 33), 0.2), ((140_000,), 0.013)):
        bases = [torch.randn(n, generator=g).to(dtype) for n in sizes]
        experts = [[(b + 0.1 * torch.randn(b.shape, generator=g)).to(dtype) for _ in range(2)] for b in bases]
        names = [f"t{i}" for i in range(len(sizes))]
        rule = one_more(density, ties, scope)
        group = Group(names, bases, experts, rule, [dtype] * len(sizes), None)
        wanted = reference.merge_group(names, bases, experts, rule, [dtype] * len(sizes))
        for isa in ISAS:
            assert_same_bits(group, run_native(group, Settings(isa=isa, threads=2))[0], wanted)


def test_one_more_really_is() -> None:
    magnitudes = torch.arange(10, dtype=torch.int32)
    for density, kept in ((0.5, 6), (0.99, 10), (0.05, 1)):
        assert int(reference.select(magnitudes, density, ThresholdTies.FIRST, one_more=True).sum()) == kept


def test_kernels_for_gpus_refuse_it_by_name() -> None:
    with pytest.raises(BackendError, match="keeps one entry more"):
        check_rule(one_more(0.2, ThresholdTies.ALL, Scope.TENSOR), "cuda")
