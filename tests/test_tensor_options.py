"""Options of merge_tensors: what counts as a number, a flag or a name, and how the rest is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from small_merge import ARRAYS, merged, refused

from pymerge.errors import RecipeError

HALF: list[Any] = [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), ml_dtypes.bfloat16(0.5)]
EACH: list[Any] = [[0.5, 1, 0], (0.5, 1.0, 0), np.array([0.5, 1, 0]), torch.tensor([0.5, 1, 0])]


@pytest.mark.parametrize("value", HALF, ids=repr)
@pytest.mark.parametrize("name", ["weight", "density", "lambda_"])
def test_scalars_of_any_library_are_numbers(name: str, value: Any) -> None:
    assert torch.equal(merged(**{name: value}), merged(**{name: 0.5}))


@pytest.mark.parametrize("values", [*EACH, iter([0.5, 1, 0])], ids=lambda values: type(values).__name__)
def test_one_weight_for_each_expert(values: Any) -> None:
    assert torch.equal(merged(weight=values), merged(weight=[0.5, 1.0, 0.0]))


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_whole_numbers_of_any_library(three: Any) -> None:
    drawn = merged(method="dare_ties", seed=three, threads=three)
    assert torch.equal(drawn, merged(method="dare_ties", seed=3))


@pytest.mark.parametrize(
    "kind", [torch.float16, np.float16, np.dtype("f2"), "float16", "torch.float16", "f2"]
)
def test_out_dtype_by_any_name(kind: object) -> None:
    assert merged(out_dtype=kind).dtype == torch.float16
    assert merged(ARRAYS[0], ARRAYS[1:], out_dtype=kind).dtype == np.float16


NAN = float("nan")
WRONG_OPTIONS: list[tuple[str, Any, str]] = [
    ("threads", 1.5, "threads is 1.5, expected a whole number"),
    ("threads", "2", "threads is '2'"),
    ("threads", True, "threads is True"),
    ("threads", 10**6000, "threads is a number of 19932 bits"),
    ("seed", 1.5, "seed is 1.5, expected a whole number"),
    ("seed", None, "seed is None"),
    ("seed", -(10**6000), "seed is a number of"),
    ("seed", -1, "outside 0 to"),
    ("weight", True, "weight is True, expected a number"),
    ("weight", np.True_, "weight is True"),
    ("weight", "1", "weight is '1'"),
    ("weight", {1.0, 2.0, 3.0}, "expected a number, or a list"),
    ("weight", [1, "a", 2], "weight of expert 1 is 'a', expected a number"),
    ("weight", [1, True, 2], "weight of expert 1 is True"),
    ("weight", NAN, "weight of expert 0 is nan, which is not a finite number"),
    ("weight", [1, 2, float("inf")], "weight of expert 2 is inf"),
    ("weight", 10**6000, "weight is too large"),
    ("weight", np.ones((3, 1)), r"weight of expert 0 is \[1.0\], expected a number"),
    ("weight", float, "weight is <class 'float'>"),
    ("weight", torch.ones((), device="meta"), "weight is a tensor whose values cannot be read"),
    ("weight", torch.ones(3, requires_grad=True), "weight requires a gradient"),
    ("density", True, "density is True"),
    ("density", NAN, "density of expert 0 is nan, which is outside 0 to 1"),
    ("density", [0.1, 0.2, None], "density of expert 2 is None"),
    ("lambda_", "a", "lambda_ is 'a', expected a number"),
    ("lambda_", NAN, "lambda is nan"),
    ("lambda_", [1.0], r"lambda_ is \[1.0\]"),
    ("normalize", "yes", "normalize is 'yes', expected True, False or None"),
    ("normalize", 1, "normalize is 1"),
    ("normalize", 10**6000, "normalize is an integer too long"),
    ("rescale", "no", "rescale is 'no'"),
    ("method", None, "method is None, expected a name"),
    ("method", [], r"method is \[\]"),
    ("scope", "models", "scope is 'models', expected tensor or model"),
    ("preset", None, "preset is None, expected mergekit or paper or peft or fusionbench"),
    ("threshold_ties", np.array([1, 2]), "expected first or all"),
    ("backend", "", "backend is '', expected cpu or cuda or reference or triton"),
    ("out_dtype", 5, "out_dtype is 5, expected a float type"),
    ("out_dtype", ">f4", "out_dtype is '>f4'"),
    ("out_dtype", torch.ones(40, 40), "expected a float type"),
]


@pytest.mark.parametrize(
    ("name", "value", "text"), WRONG_OPTIONS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_options(name: str, value: Any, text: str) -> None:
    refused(RecipeError, text, lambda: merged(**{name: value}))
