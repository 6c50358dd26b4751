"""Whole models in memory: modules and state dicts, their names, what is kept, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_merge import refused
from torch import nn

import pymerge
from pymerge.errors import BackendError, PymergeError, RecipeError

OPTIONS: dict[str, Any] = {"method": "ties", "density": 0.4, "weight": 0.7}


class Small(nn.Module):  # type: ignore[misc]
    """A tied head, a batch norm with its counter, a buffer of integers."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("position_ids", torch.arange(4))
        self.body[1].num_batches_tracked.fill_(seed)


def bits(model: nn.Module | dict[str, Any]) -> dict[str, Any]:
    """A copy of everything in it."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.fixture
def models() -> list[Small]:
    return [Small(seed) for seed in range(3)]


def wanted(models: list[Small]) -> dict[str, Any]:
    """Each float by itself through merge_tensors; the rest from the base."""
    states = [model.state_dict() for model in models]
    merged = {
        name: pymerge.merge_tensors(first, [state[name] for state in states[1:]], **OPTIONS)
        for name, first in states[0].items()
        if first.is_floating_point()
    }
    return {name: merged.get(name, first) for name, first in states[0].items()}


def test_a_new_state_dict(models: list[Small]) -> None:
    before = [bits(model) for model in models]
    merged = pymerge.merge_state_dicts(models[0], models[1:], **OPTIONS)
    assert_equal(merged, wanted(models))
    for model, old in zip(models, before, strict=True):
        assert_equal(bits(model), old)
    assert merged["body.1.num_batches_tracked"] == 0
    merged["position_ids"].fill_(9)
    assert_equal(bits(models[0]), before[0])


@pytest.mark.parametrize("as_dict", [False, True], ids=["module", "dict"])
def test_into_a_model(models: list[Small], as_dict: bool) -> None:
    expected = wanted(models)
    target = models[0].state_dict() if as_dict else models[0]
    places = {name: value.data_ptr() for name, value in models[0].state_dict().items()}
    pymerge.merge_into(target, [models[1], models[2].state_dict()], **OPTIONS)
    assert_equal(bits(models[0]), expected)
    assert {name: value.data_ptr() for name, value in models[0].state_dict().items()} == places
    assert models[0].head.weight is models[0].embed.weight
    assert models[0].embed.weight.requires_grad


def test_a_base_of_its_own_and_methods_without_one(models: list[Small]) -> None:
    target = Small(9)
    pymerge.merge_into(target, models[1:], base=models[0], **OPTIONS)
    expected = wanted(models)
    expected["body.1.num_batches_tracked"] = torch.tensor(9)  # it is not merged, so it stays
    assert_equal(bits(target), expected)
    pymerge.merge_into(target, [models[1], models[2]], method="linear")
    mean = pymerge.merge_tensors(None, [m.body[0].weight.detach() for m in models[1:]], method="linear")
    assert torch.equal(target.body[0].weight, mean)
    averaged = pymerge.merge_state_dicts(None, models[1:], method="linear")
    assert averaged["body.1.num_batches_tracked"] == 1
    assert torch.equal(averaged["body.0.weight"], mean)


def test_results_have_the_model_s_types(models: list[Small]) -> None:
    expected = wanted(models)
    target = copy.deepcopy(models[0]).half()
    pymerge.merge_into(target, models[1:], base=models[0], **OPTIONS)
    assert torch.equal(target.body[0].weight, expected["body.0.weight"].half())


def test_tied_tensors_are_merged_once(models: list[Small]) -> None:
    merged = pymerge.merge_state_dicts(models[0], models[1:], **OPTIONS)
    assert merged["head.weight"] is merged["embed.weight"]
    lone = [{name: x for name, x in m.state_dict().items() if name != "head.weight"} for m in models[1:]]
    assert_equal(pymerge.merge_state_dicts(models[0], lone, **OPTIONS), merged)
    # Over the whole model, too, they count once.
    whole = pymerge.merge_state_dicts(models[0], models[1:], scope="model", **OPTIONS)
    alone = [{n: x for n, x in m.state_dict().items() if n != "head.weight"} for m in models]
    assert torch.equal(
        whole["body.0.weight"],
        pymerge.merge_state_dicts(alone[0], alone[1:], scope="model", **OPTIONS)["body.0.weight"],
    )


def test_what_one_model_has_untied_is_merged_apart(models: list[Small]) -> None:
    models[2] = Small(2, tied=False)
    merged = pymerge.merge_state_dicts(models[0], models[1:], **OPTIONS)
    assert_equal(merged, wanted(models))
    before = bits(models[0])
    with pytest.raises(BackendError, match="expert 1 has different values for 'embed"):
        pymerge.merge_into(models[0], models[1:], **OPTIONS)
    assert_equal(bits(models[0]), before)


def test_views_of_one_memory_are_not_tied() -> None:
    square = torch.arange(9.0).reshape(3, 3)
    base = {"a": square, "b": square.T}
    experts = [{"a": square + 1, "b": square.T + 2}]
    merged = pymerge.merge_state_dicts(base, experts, method="task_arithmetic")
    assert_equal(merged, experts[0])


def test_only_and_exclude(models: list[Small]) -> None:
    expected, base = wanted(models), bits(models[0])
    merged = pymerge.merge_state_dicts(models[0], models[1:], only="body.*", exclude=["*.1.*"], **OPTIONS)
    for name, value in merged.items():
        assert torch.equal(value, (expected if name.startswith("body.0.") else base)[name])
    # What is not merged may differ in shape, or be missing.
    odd = [{"body.0.weight": m.body[0].weight.detach(), "head.weight": torch.ones(7)} for m in models[1:]]
    pymerge.merge_into(models[0], odd, only="body.0.weight", **OPTIONS)
    base["body.0.weight"] = expected["body.0.weight"]
    assert_equal(bits(models[0]), base)
    refused(
        RecipeError,
        "^only: no tensor is called 'bodies",
        lambda: pymerge.merge_state_dicts(models[0], models[1:], only="bodies.*"),
    )


def test_extra_state_is_the_base_s(models: list[Small]) -> None:
    base = models[0].state_dict() | {"body._extra_state": {"scale": 3}}
    merged = pymerge.merge_state_dicts(base, models[1:], **OPTIONS)
    assert merged.pop("body._extra_state") == {"scale": 3}
    assert_equal(merged, wanted(models))


def test_numpy_dicts() -> None:
    base, one, two = ({"w": np.array([x, 1, -x], np.float32), "n": np.array(x)} for x in (0, 2, 4))
    merged = pymerge.merge_state_dicts(base, [one, two], method="task_arithmetic", weight=0.5)
    assert merged["w"].tolist() == [3, 1, -3]
    assert merged["n"] == 0
    pymerge.merge_into(base, [one, two], method="task_arithmetic", weight=0.5)
    assert base["w"].tolist() == [3, 1, -3]


def test_presets_and_other_options(models: list[Small]) -> None:
    base, *experts = (
        {name: x for name, x in model.state_dict().items() if x.is_floating_point()} for model in models
    )
    for preset in ("paper", "fusionbench"):  # the flat model counts each tied tensor once
        given = pymerge.merge_state_dicts(models[0], models[1:], preset=preset)
        once = [{n: x for n, x in state.items() if n != "head.weight"} for state in (base, *experts)]
        expected = pymerge.merge_tensors(once[0], once[1:], preset=preset)
        for name, value in expected.items():
            assert torch.equal(given[name], value), name
    with pytest.raises(RecipeError, match="preset paper has no slerp"):
        pymerge.merge_state_dicts(models[0], models[1:], method="slerp", preset="paper")


def without(*names: str) -> dict[str, Any]:
    return {name: x for name, x in Small(1, tied=False).state_dict().items() if name not in names}


WRONG: list[tuple[list[Any], dict[str, Any], str]] = [
    ([without("body.0.weight", "body.0.bias")], {}, r"expert 0 does not have the tensors of the model: 2 m"),
    (
        [without() | {f"x{k}": torch.ones(1) for k in range(5)}],
        {},
        r"0 missing, 5 more \('x0', 'x1', 'x2', \.\.\.",
    ),
    ([], {}, "experts is an empty list"),
    ([3], {}, "expert 0 is an int, expected a torch module or a dict"),
    ([{"a": {"b": 1}}], {}, "expert 0: 'a' is a dict, expected a tensor"),
    ([without() | {"body.0.bias": torch.ones(7)}], {}, r"'body.0.bias': expert 0 has shape \(7,\), expected"),
    ([without()], {"out": {}}, "out is an option of merge_tensors only"),
    ([without()], {"density": 2}, "density of expert 0 is 2"),
    ([without()], {"method": "tie"}, "tie"),
    ([without()], {"preset": "mergekitt"}, "preset is 'mergekitt'"),
    ([without()], {"exclude": 3}, "exclude is 3, expected"),
]


@pytest.mark.parametrize(("experts", "options", "text"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_refused_changes_nothing(experts: list[Any], options: dict[str, Any], text: str) -> None:
    target = Small(tied=False)
    before = bits(target)
    refused(PymergeError, text, lambda: pymerge.merge_into(target, experts, **options))
    assert_equal(bits(target), before)


def test_modules_that_can_be_iterated_are_no_list() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refused(
        BackendError, "experts is a Sequential, expected a list", lambda: pymerge.merge_into(layers, layers)
    )


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (torch.zeros(1).expand(3), "tensor 'w': model has several elements at one address"),
        (torch.zeros(3, device="meta"), "tensor 'w': model is a Tensor of layout"),
        (np.broadcast_to(np.zeros(1, np.float32), 3), "tensor 'w': model is read-only"),
    ],
    ids=["expanded", "meta", "read-only"],
)
def test_models_that_cannot_be_written(array: Any, text: str) -> None:
    ones = np.ones(3, np.float32) if isinstance(array, np.ndarray) else torch.ones(3)
    refused(BackendError, text, lambda: pymerge.merge_into({"w": array}, [{"w": ones}], method="linear"))


W = torch.zeros(10)
OVERLAPPING: dict[str, Any] = {
    "a window that slides": {"w": W.as_strided((3, 3), (1, 1))},
    "parts": {"a": W[:6], "b": W[4:]},
    "two shapes": {"w": W, "v": W.view(2, 5)},
    "a transpose": {"w": W[:9].view(3, 3), "t": W[:9].view(3, 3).t()},
}


@pytest.mark.parametrize("name", list(OVERLAPPING))
def test_tensors_that_overlap_are_not_merged_into(name: str) -> None:
    model = OVERLAPPING[name]
    expert = {key: torch.ones(x.shape) for key, x in model.items()}
    text = "several elements at one address" if len(model) == 1 else "share memory, so neither"
    refused(BackendError, text, lambda: pymerge.merge_into(model, [expert], method="linear"))
    assert not W.any()


def test_what_is_excluded_is_not_changed_through_another_name(models: list[Small]) -> None:
    before = bits(models[0])
    refused(
        BackendError,
        "'embed.weight' and 'head.weight' of the model share memory",
        lambda: pymerge.merge_into(models[0], models[1:], exclude="head.*", **OPTIONS),
    )
    assert_equal(bits(models[0]), before)


def test_a_state_dict_of_copies_is_not_merged_into() -> None:
    class Copying(nn.Linear):  # type: ignore[misc]
        def state_dict(self, *given: Any, **more: Any) -> dict[str, Any]:
            return {name: x.clone() for name, x in super().state_dict(*given, **more).items()}

    model = Copying(2, 2)
    refused(
        BackendError,
        r"state_dict\(\) of the model gives a copy of it",
        lambda: pymerge.merge_into(model, [Copying(2, 2)], method="linear"),
    )


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({1: torch.ones(2)}, "has a tensor named 1, but names must be text"),
        (nn.LazyLinear(3), "has no shape before the model is called"),
    ],
)
def test_models_without_names_or_shapes(model: Any, text: str) -> None:
    calls: tuple[Callable[..., Any], ...] = (pymerge.merge_state_dicts, pymerge.merge_into)
    for call in calls:
        refused(BackendError, text, partial(call, model, [model], method="linear", only="*"))


def test_equal_nans_are_tied_too(models: list[Small]) -> None:
    """Copies of a tied tensor have the same bits, NaN or not."""
    with torch.no_grad():
        models[1].head.weight[0, 0] = torch.nan
    copies = {name: x.clone() for name, x in models[1].state_dict().items()}
    pymerge.merge_into(models[0], [copies], method="linear")
    assert bool(models[0].head.weight[0, 0].isnan())
    assert torch.equal(models[0].head.weight[1:], models[1].head.weight[1:])
