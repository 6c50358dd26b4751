"""The table of methods and the rules made from it."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from pymerge.errors import ProblemList, RecipeError
from pymerge.explaining import explain
from pymerge.methods import METHODS, Method, method_named
from pymerge.parameters import Preset
from pymerge.rule import Fuse, Rule, Scope, ThresholdTies, Trim, passes
from pymerge.ruling import rule_for

TIES = METHODS["ties"]
# As mergekit 0.1.5 has them: elects, trims, normalize, rescale.
DEFAULTS = {
    "linear": (False, Trim.NONE, True, False),
    "task_arithmetic": (False, Trim.NONE, False, False),
    "ties": (True, Trim.MAGNITUDE, True, False),
    "dare_linear": (False, Trim.RANDOM, False, True),
    "dare_ties": (True, Trim.RANDOM, False, True),
    "breadcrumbs": (False, Trim.OUTLIERS, False, False),
    "breadcrumbs_ties": (True, Trim.OUTLIERS, False, False),
    "della": (True, Trim.RANKED, True, True),
    "della_linear": (False, Trim.RANKED, False, True),
}
# Methods whose entries fuse, or that rank scores: what they trim by.
OTHERS = {
    "sce": Trim.VARIANCE,
    "ram": Trim.NONE,
    "ramplus_tl": Trim.NONE,
    "nearswap": Trim.NONE,
    "arcee_fusion": Trim.IMPORTANCE,
    "magmax": Trim.NONE,
    "emr": Trim.NONE,
    "consensus": Trim.NONE,
}
BLENDS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
SUMS = [row for row in METHODS.values() if row.name in DEFAULTS]


def test_the_rows_are_mergekit_s() -> None:
    rows = {row.name: (row.elect, row.trim, row.normalize, row.rescale) for row in METHODS.values()}
    plain = dict.fromkeys((*BLENDS, "passthrough"), Trim.NONE) | OTHERS
    assert rows == DEFAULTS | {name: (False, trim, False, False) for name, trim in plain.items()}
    assert [name for name, row in METHODS.items() if row.blend] == list(BLENDS)
    relative = [name for name, row in METHODS.items() if row.task_vector]
    assert relative == [*(name for name in DEFAULTS if name != "linear"), *OTHERS, "model_stock"]
    assert {row.density for row in METHODS.values()} == {1.0}


@pytest.mark.parametrize("method", SUMS, ids=lambda row: row.name)
def test_defaults_reach_the_rule(method: Method) -> None:
    rule = rule_for(method, weights=[1, 0.5])
    assert rule == Rule(
        task_vector=method.task_vector,
        trim=method.trim,
        elect=method.elect,
        normalize=method.normalize,
        rescale=method.rescale,
        weights=(1.0, 0.5),
        densities=(1.0, 1.0),
        gammas=(0.01, 0.01) if method.trim is Trim.OUTLIERS else (),
        epsilons=(0.15, 0.15) if method.trim is Trim.RANKED else (),
    )
    assert all(type(weight) is float for weight in rule.weights)


def test_what_is_given_reaches_the_rule() -> None:
    rule = rule_for(
        TIES,
        weights=[-1, 2],
        densities=[0, 0.5],
        lambda_=3,
        normalize=False,
        rescale=True,
        threshold_ties=ThresholdTies.ALL,
        scope=Scope.MODEL,
        seed=2**64 - 1,
    )
    expected = Rule(
        task_vector=True,
        trim=Trim.MAGNITUDE,
        elect=True,
        normalize=False,
        rescale=True,
        weights=(-1.0, 2.0),
        densities=(0.0, 0.5),
        lambda_=3.0,
        threshold_ties=ThresholdTies.ALL,
        scope=Scope.MODEL,
        seed=2**64 - 1,
    )
    assert rule == expected


def test_what_a_method_does_not_use_is_neutral() -> None:
    plain = rule_for(
        METHODS["linear"], weights=[1], densities=[0.1], lambda_=5, rescale=True, scope=Scope.MODEL
    )
    assert (plain.densities, plain.lambda_, plain.rescale, plain.scope) == ((1.0,), 1.0, False, Scope.TENSOR)
    dare = rule_for(METHODS["dare_ties"], weights=[1], densities=[0.1], scope=Scope.MODEL)
    assert (dare.densities, dare.rescale, dare.scope) == ((0.1,), True, Scope.TENSOR)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"weights": []}, "ties needs at least one expert"),
        ({"weights": [1, 2], "densities": [1]}, "1 densities for 2 experts"),
        ({"weights": [1], "densities": [1, 1]}, "2 densities for 1 experts"),
        ({"weights": [math.nan]}, "weight of expert 0 is nan, which is not a finite number in float32"),
        ({"weights": [1, -math.inf]}, "weight of expert 1 is -inf, which is not a finite number in float32"),
        ({"weights": [1e39]}, "weight of expert 0 is 1e+39, which is not a finite number in float32"),
        ({"weights": [True]}, "weight of expert 0 is True, which is not a finite number in float32"),
        ({"weights": [1], "densities": [1.0001]}, "density of expert 0 is 1.0001, which is outside 0 to 1"),
        ({"weights": [1], "densities": [-0.1]}, "density of expert 0 is -0.1, which is outside 0 to 1"),
        ({"weights": [1], "densities": [math.nan]}, "density of expert 0 is nan, which is outside 0 to 1"),
        ({"weights": [1], "lambda_": math.inf}, "lambda is inf, which is not a finite number in float32"),
        ({"weights": [1], "seed": -1}, "seed is -1, which is outside 0 to 2**64 - 1"),
        ({"weights": [1], "seed": 2**64}, "seed is 18446744073709551616, which is outside 0 to 2**64 - 1"),
        (
            {"weights": [math.nan], "names": ["x/y"]},
            "weight of x/y is nan, which is not a finite number in float32",
        ),
    ],
)
def test_bad_numbers(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rule_for(TIES, **given)  # type: ignore[arg-type]
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("method", "given", "sentence"),
    [
        (
            "della",
            {"densities": [0.9]},
            "density 0.9 of expert 0 less and plus epsilon 0.15 must lie between 0 and 1, both excluded",
        ),
        (
            "della",
            {"densities": [0.1]},
            "density 0.1 of expert 0 less and plus epsilon 0.15 must lie between 0 and 1, both excluded",
        ),
        (
            "della",
            {"densities": [0.5], "epsilons": [math.nan]},
            "density 0.5 of expert 0 less and plus epsilon nan",
        ),
        ("della", {"densities": [0.5], "epsilons": [0.1, 0.1]}, "2 epsilons for 1 experts"),
        ("nearswap", {}, "t must be given"),
        ("sce", {"options": {"select_topk": 1.5}}, "select_topk is 1.5, which is outside 0 to 1"),
        ("ram", {"options": {"epsilon": -1}}, "epsilon is -1, expected at least 0"),
        ("ramplus_tl", {"options": {"r": math.inf}}, "r is inf, which is not a finite number in float32"),
        ("consensus", {"options": {"votes": 0}}, "votes is 0, expected a whole number from 1 to"),
    ],
)
def test_bad_numbers_of_single_methods(method: str, given: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        rule_for(METHODS[method], weights=[1], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_ranks_do_not_matter_where_all_or_nothing_is_kept(density: float) -> None:
    assert rule_for(METHODS["della"], weights=[1], densities=[density], epsilons=[0.4]).densities == (
        density,
    )


def test_bad_numbers_come_together() -> None:
    with pytest.raises(ProblemList) as caught:
        rule_for(TIES, weights=[math.nan, 1], densities=[2, -1], lambda_=math.nan)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("weights", [[0.0], [1, -1], [0.1, 0.2, -0.3]])
@pytest.mark.parametrize(
    ("name", "normalize", "refused"),
    [
        ("linear", None, True),
        ("linear", False, False),
        ("task_arithmetic", None, False),
        ("task_arithmetic", True, True),
        ("dare_linear", True, True),
        ("ties", None, False),
        ("dare_ties", True, False),
    ],
)
def test_weights_that_sum_to_zero(
    weights: list[float], name: str, normalize: bool | None, refused: bool
) -> None:
    if not refused:
        assert rule_for(METHODS[name], weights=weights, normalize=normalize).weights == tuple(weights)
        return
    with pytest.raises(RecipeError, match=f"the weights of {name} sum to .*, so they cannot be normalized"):
        rule_for(METHODS[name], weights=weights, normalize=normalize)


def test_weights_may_sum_to_more_than_float32_holds() -> None:
    assert rule_for(METHODS["linear"], weights=[3e38, 3e38]).normalize


@pytest.mark.parametrize(
    ("name", "densities", "rescale", "number"),
    [
        ("linear", None, None, 1),
        ("task_arithmetic", [0.5], True, 1),
        ("ties", [0.5], None, 1),
        ("ties", [0.5], True, 2),
        ("ties", [1.0], True, 1),
        ("dare_ties", [0.5], None, 2),
        ("dare_ties", [0.5], False, 1),
        ("dare_ties", None, None, 1),
        ("della", [0.5], None, 2),
        ("sce", None, None, 2),
        ("ram", None, None, 1),
        ("ramplus_tl", None, None, 2),
        ("arcee_fusion", None, None, 3),
    ],
)
def test_passes(name: str, densities: list[float] | None, rescale: bool | None, number: int) -> None:
    assert passes(rule_for(METHODS[name], weights=[1], densities=densities, rescale=rescale)) == number


@pytest.mark.parametrize("name", ["tie", "ties_", "TIES", "dare-ties", "slurp", ""])
def test_unknown_methods_list_the_known(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method_named(name)
    assert f"unknown merge method {name!r}" in str(caught.value)
    assert "known are linear, task_arithmetic, ties, dare_linear, dare_ties" in str(caught.value)


def test_near_names_are_suggested() -> None:
    for given, meant in (("dare-ties", "dare_ties"), ("TIES", "ties"), ("Slerp", "slerp")):
        with pytest.raises(RecipeError, match=rf"did you mean {meant}\?"):
            method_named(given)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_explain_follows_the_row(method: Method) -> None:
    lines = dict(line.split(maxsplit=1) for line in explain(method).splitlines()[1:])
    assert list(lines) == [
        "paper",
        "inputs",
        "defaults",
        "statistics",
        "trim",
        "elect",
        "combine",
        "passes",
        "bytes",
    ]
    assert ("none" in lines["trim"]) == (method.trim is Trim.NONE)
    elects = method.elect or method.fuse in (Fuse.ENERGY, Fuse.ELECTED)
    assert lines["elect"].startswith("none") != elects
    assert ("divided by" in lines["combine"]) == (method.normalize or method.fuse is Fuse.ENERGY)
    twice = method.rescale or method.blend or "alpha" in method.own or method.trim is Trim.VARIANCE
    assert lines["passes"][0] == ("3" if method.trim is Trim.IMPORTANCE else "2" if twice else "1")
    assert ("k-th largest" in lines["statistics"]) == (method.trim in (Trim.MAGNITUDE, Trim.VARIANCE))
    assert ("K + 1" in lines["bytes"]) == (method.task_vector and method.most is None)


def test_explain_of_ram_mentions_no_factor() -> None:
    assert "factor" not in explain(METHODS["ram"])
    assert "times its expert's factor" in explain(METHODS["ramplus_tl"])


def test_explain_of_a_preset() -> None:
    paper = explain(TIES, Preset.PAPER)
    assert "weight 1, normalize true, density 0.2, rescale false, scope model, threshold_ties all" in paper
    assert "preset      paper; where the kept" in paper
    assert "keep the int(density * n) + 1 largest |d|, and all that equal" in paper
    assert "lambda 0.3" in explain(TIES, Preset.FUSIONBENCH)
    peft = explain(TIES, Preset.PEFT)
    assert "the sign of the sum of the entries" in peft
    assert "divided by how many took part" in peft
    assert "which must be given" in peft
    assert "which must be given" not in paper
    divided = explain(METHODS["dare_linear"], Preset.PAPER)
    assert "what is kept is divided by the density" in divided
    assert "passes      1 (2 with rescale: true)" in divided
    with pytest.raises(RecipeError, match="preset paper has no slerp"):
        explain(METHODS["slerp"], Preset.PAPER)


def test_explain_is_derived_and_not_written() -> None:
    other = dataclasses.replace(TIES, elect=False, rescale=True, normalize=False)
    text = explain(other)
    assert "sum |d| before and after the trim" in text
    assert "2 while density < 1" in text
    assert "elect       none" in text
    assert "divided by" not in text
