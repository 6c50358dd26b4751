"""merge_tensors: torch and numpy in, the same kind out, the reference's bits, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import METHODS

import pymerge
from pymerge import merge_tensors
from pymerge.errors import BackendError, PymergeError, RecipeError

K = 3


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw) * 0.02
    updates = torch.randn((K, *shape), generator=draw).pow(3) * 1e-3
    return base.to(dtype), [(base + update).to(dtype) for update in updates]


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (150, 200), (3, 5, 7, 11)])
def test_torch_tensors_equal_the_reference(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, experts = make(shape, dtype)
    options: dict[str, Any] = {
        "method": method,
        "density": [0.2, 0.5, 1.0],
        "weight": [1.0, 0.5, -0.25],
        "lambda_": 0.7,
    }
    before = [x.clone() for x in (base, *experts)]
    merged = pymerge.merge_tensors(base, experts, **options)
    expected = pymerge.merge_tensors(base, experts, backend="reference", **options)
    assert merged.dtype == dtype
    assert merged.shape == shape
    assert torch.equal(as_bits(merged), as_bits(expected))
    assert all(torch.equal(x, y) for x, y in zip((base, *experts), before, strict=True))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_numpy_arrays_give_numpy_arrays(dtype: type) -> None:
    base, experts = make((40, 50), torch.float32)
    arrays = [x.numpy().astype(dtype) for x in (base, *experts)]
    merged = pymerge.merge_tensors(arrays[0], arrays[1:], density=0.2)
    assert isinstance(merged, np.ndarray)
    assert merged.dtype == dtype
    tensors = [
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if dtype is ml_dtypes.bfloat16
        else torch.from_numpy(x)
        for x in arrays
    ]
    expected = pymerge.merge_tensors(tensors[0], tensors[1:], density=0.2)
    assert merged.tobytes() == as_bits(expected).numpy().tobytes()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_memory_layout(layout: str) -> None:
    base, experts = make((33, 47), torch.bfloat16)
    odd = [LAYOUTS[layout](x) for x in (base, *experts)]
    merged = pymerge.merge_tensors(odd[0], odd[1:], density=0.3)
    plain = [x.contiguous() for x in odd]
    assert torch.equal(merged, pymerge.merge_tensors(plain[0], plain[1:], density=0.3))


def test_mixed_types_and_out_dtype() -> None:
    base, experts = make((100,), torch.float32)
    mixed = [experts[0].bfloat16(), experts[1].half(), experts[2]]
    assert pymerge.merge_tensors(base, mixed).dtype == torch.float32
    narrow = pymerge.merge_tensors(base, mixed, out_dtype=torch.bfloat16)
    expected = pymerge.merge_tensors(base, mixed, out_dtype=torch.bfloat16, backend="reference")
    assert torch.equal(as_bits(narrow), as_bits(expected))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_dicts_of_tensors(scope: str) -> None:
    base: dict[str, torch.Tensor] = {}
    experts: list[dict[str, torch.Tensor]] = [{} for _ in range(K)]
    for i, name in enumerate(["b", "a", "c"]):
        base[name], tensors = make((50 * (i + 1), 40), torch.bfloat16, seed=i)
        for expert, tensor in zip(experts, tensors, strict=True):
            expert[name] = tensor
    base["steps"] = torch.arange(4)
    for expert in experts:
        expert["steps"] = torch.arange(4)
    merged = pymerge.merge_tensors(base, experts, density=0.2, scope=scope)
    expected = pymerge.merge_tensors(base, experts, density=0.2, scope=scope, backend="reference")
    assert list(merged) == list(base)
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    experts[1]["steps"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(PymergeError, match=r"steps.*integers must be equal"):
        pymerge.merge_tensors(base, experts)


def test_out_is_written_and_returned() -> None:
    base, experts = make((1000,), torch.float16)
    out = torch.empty_like(base)
    assert pymerge.merge_tensors(base, experts, out=out) is out
    assert torch.equal(out, pymerge.merge_tensors(base, experts))


def test_linear_takes_no_base() -> None:
    _, experts = make((64,), torch.float32)
    mean = pymerge.merge_tensors(None, experts, method="linear")
    torch.testing.assert_close(mean, torch.stack(experts).mean(0))


BASE, EXPERTS = make((8, 4), torch.float32)
COMPLEX = BASE.to(torch.complex64)
LEARNED = EXPERTS[0].clone().requires_grad_()
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no base": (lambda: merge_tensors(None, EXPERTS), RecipeError, "needs a base"),
    "method": (lambda: merge_tensors(BASE, EXPERTS, method="tie"), RecipeError, "did you mean ties"),
    "density": (
        lambda: merge_tensors(BASE, EXPERTS, density=[0.2, 1.2, 0.2]),
        PymergeError,
        "outside 0 to 1",
    ),
    "weights": (
        lambda: merge_tensors(BASE, EXPERTS, weight=[1, 2]),
        RecipeError,
        "2 values of weight for 3",
    ),
    "ties": (
        lambda: merge_tensors(BASE, EXPERTS, threshold_ties="last"),
        RecipeError,
        "first or all",
    ),
    "backend": (
        lambda: merge_tensors(BASE, EXPERTS, backend="gpu"),
        RecipeError,
        "cpu or cuda or reference or triton",
    ),
    "shape": (
        lambda: merge_tensors(BASE, [EXPERTS[0].t()]),
        BackendError,
        r"shape \(4, 8\), expected \(8, 4\)",
    ),
    "kind": (lambda: merge_tensors(BASE, [EXPERTS[0].numpy()]), BackendError, "ndarray"),
    "list": (lambda: merge_tensors([1.0], [[2.0]]), BackendError, "found a list"),
    "dtype": (
        lambda: merge_tensors(COMPLEX, [COMPLEX]),
        BackendError,
        "complex64",
    ),
    "gradient": (
        lambda: merge_tensors(BASE, [LEARNED]),
        BackendError,
        "gradient",
    ),
    "sparse": (lambda: merge_tensors(BASE.to_sparse(), [BASE.to_sparse()]), BackendError, "dense"),
    "meta": (lambda: merge_tensors(BASE.to("meta"), [BASE.to("meta")]), BackendError, "lies on meta"),
    "alias": (lambda: merge_tensors(BASE, EXPERTS, out=BASE), BackendError, "shares memory"),
    "out": (
        lambda: merge_tensors(BASE, EXPERTS, out=torch.empty(3)),
        BackendError,
        "out must have shape",
    ),
    "int out": (lambda: merge_tensors(BASE, EXPERTS, out_dtype=torch.int8), RecipeError, "a float"),
    "meta out": (lambda: merge_tensors(BASE, EXPERTS, out=BASE.to("meta")), BackendError, "lies on meta"),
    "names": (lambda: merge_tensors({"a": BASE}, [{"b": BASE}]), BackendError, "differ in"),
    "threads": (lambda: merge_tensors(BASE, EXPERTS, threads=0), RecipeError, "threads is 0"),
    "crowd": (lambda: merge_tensors(BASE, EXPERTS, threads=10**6), BackendError, "expected 1 to 1024"),
    "no experts": (lambda: merge_tensors(BASE, []), PymergeError, "at least one expert"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_are_one_clear_sentence(name: str) -> None:
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_rescale_with_an_infinite_entry() -> None:
    """The scale is NaN, so a kept zero counts: the one-pass route must not pass it over."""
    base, expert = torch.zeros(20_000), torch.zeros(20_000)
    expert[0] = torch.inf
    options: dict[str, Any] = {"density": 0.5, "rescale": True}
    merged = merge_tensors(base, [expert], **options)
    expected = merge_tensors(base, [expert], backend="reference", **options)
    assert torch.equal(as_bits(merged), as_bits(expected))
    assert merged.isnan().any()


def test_out_must_touch_nothing_else() -> None:
    a, b = torch.randn(30), torch.randn(30)
    experts = [{"a": torch.randn(30), "b": torch.randn(30)}]
    with pytest.raises(BackendError, match=r"tensor 'a': out shares memory with an input"):
        merge_tensors({"a": a, "b": b}, experts, out={"a": experts[0]["b"], "b": torch.empty(30)})
    both = torch.empty(30)
    with pytest.raises(BackendError, match=r"tensor 'b': out shares memory with another out"):
        merge_tensors({"a": a, "b": b}, experts, out={"a": both, "b": both})
    table = torch.randn(30, 40)
    with pytest.raises(BackendError, match="out shares memory with an input"):
        merge_tensors(table.t(), [torch.randn(40, 30)], out=table.view(40, 30))


def test_scope_model_needs_one_working_type() -> None:
    base = {"a": torch.randn(9), "b": torch.randn(9, dtype=torch.float64)}
    expert = {name: x + 1 for name, x in base.items()}
    with pytest.raises(BackendError, match=r"'b' is computed in float64, 'a' in float32"):
        merge_tensors(base, [expert], scope="model")


def test_what_kernels_do_not_take_goes_to_the_reference_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 and more than 64 experts; a backend that was asked for by name says no instead."""
    from pymerge import tensor_backends as tensors

    monkeypatch.setattr(tensors, "_best_on", lambda device: tensors.Backend.CUDA)
    assert tensors.choose_backend(None, "cuda:0") is tensors.Backend.CUDA
    assert tensors.choose_backend(None, "cuda:0", has_kernels=False) is tensors.Backend.REFERENCE
    assert tensors.choose_backend(None, "cpu", has_kernels=False) is tensors.Backend.CPU
    asked: list[bool] = []

    def note(wanted: object, device: str, has_kernels: bool) -> tensors.Backend:
        asked.append(has_kernels)
        return tensors.Backend.REFERENCE

    monkeypatch.setattr(tensors, "choose_backend", note)
    x = torch.ones(3)
    merge_tensors(x, [x])
    merge_tensors(x, [x], out_dtype="float64")
    merge_tensors(x.double(), [x])
    merge_tensors(x, [x] * 65)
    assert asked == [True, False, False, False]
