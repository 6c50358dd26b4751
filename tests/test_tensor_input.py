"""Odd inputs of merge_tensors: the same values in disguise, and what no backend takes, in which words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from small_merge import ARRAYS, BASE, EXPERTS, merged, refused

from pymerge import merge_tensors
from pymerge.errors import BackendError, RecipeError

EXPECTED = merged()
BACKENDS = ["cpu", "reference"]

ITERABLES: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
    "tuple": lambda: tuple(EXPERTS),
    "generator": lambda: (x for x in EXPERTS),
    "values": lambda: {str(k): x for k, x in enumerate(EXPERTS)}.values(),
}


@pytest.mark.parametrize("name", list(ITERABLES))
def test_experts_of_any_iterable(name: str) -> None:
    assert torch.equal(merged(experts=ITERABLES[name]()), EXPECTED)


FRESH = torch.zeros(8, 4)
TWO = {"a": BASE, "b": BASE}
WRONG_STRUCTURES: list[tuple[Any, Any, Any, str]] = [
    (BASE, None, None, "experts is None, expected a list"),
    (BASE, 3, None, "experts is an int"),
    (BASE, "abc", None, "experts is a str"),
    (BASE, EXPERTS[0], None, "experts is a torch.Tensor, expected a list"),
    (ARRAYS[0], ARRAYS[1], None, "experts is a numpy.ndarray"),
    (BASE, {"a": BASE}, None, "experts is a dict, expected a list"),
    (BASE, set(EXPERTS), None, "experts is a set"),
    (BASE, [None], None, "expert 0: expected a torch tensor or a numpy array, found None"),
    (BASE, [EXPERTS[0], ARRAYS[1]], None, "expert 1 is a numpy.ndarray, but base is a torch.Tensor"),
    (ARRAYS[0], EXPERTS, None, "expert 0 is a torch.Tensor, but base is a numpy.ndarray"),
    (TWO, [BASE], None, "expert 0 is a torch.Tensor, but base is a dict"),
    (BASE, [TWO], None, "expert 0 is a dict, but base is a torch.Tensor"),
    ({1: BASE}, [{1: BASE}], None, "base has a tensor named 1, but names must be text"),
    ({"\udc80": BASE}, [{"\udc80": BASE}], None, r"named '\\udc80'"),
    (TWO, [TWO, {"a": BASE}], None, r"expert 1 does not have the names of base; they differ in \['b'\]"),
    (TWO, [{"a": BASE, "b": None}], None, "tensor 'b': expert 0: expected a torch tensor.*found None"),
    ({"a": BASE, "b": ARRAYS[0]}, [TWO], None, "tensor 'b': base is a numpy.ndarray, but tensor 'a': base"),
    (TWO, [TWO], {"a": FRESH}, r"out does not have the names of base; they differ in \['b'\]"),
    (TWO, [TWO], {"a": FRESH, "b": FRESH, "c": FRESH}, r"differ in \['c'\]"),
    (TWO, [TWO], {"a": FRESH, "b": 3}, "tensor 'b': out: expected a torch tensor"),
    (TWO, [TWO], FRESH, "out is a torch.Tensor, but base is a dict"),
    (BASE, EXPERTS, {"": FRESH}, "out is a dict, but base is a torch.Tensor"),
    (BASE, EXPERTS, np.zeros((8, 4), np.float32), "out is a numpy.ndarray, but base is a torch.Tensor"),
    (BASE, EXPERTS, 3, "out: expected a torch tensor or a numpy array, found an int"),
]


@pytest.mark.parametrize(("base", "experts", "out", "text"), WRONG_STRUCTURES, ids=lambda x: str(x)[:20])
def test_wrong_structures(base: Any, experts: Any, out: Any, text: str) -> None:
    refused(BackendError, text, lambda: merged(base, experts, out=out))


def test_an_iterable_without_experts() -> None:
    refused(RecipeError, "at least one expert", lambda: merged(experts=iter(())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dicts_without_tensors(backend: str) -> None:
    assert merged({}, [{}], backend=backend) == {}
    refused(BackendError, r"differ in \['a'\]", lambda: merged({}, [{}], out={"a": FRESH}, backend=backend))


# -- arrays -------------------------------------------------------------------------------------------------


def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x: Any) -> Any:
    odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    odd[:] = x
    return odd


class Stubborn(torch.Tensor):  # type: ignore[misc]
    """A subclass that forbids arithmetic."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("sub", "mul", "add", "to", "reshape"):
            raise TypeError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


DISGUISES: dict[str, Callable[[torch.Tensor], Any]] = {
    "read-only": lambda x: read_only(x.numpy()),
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "negative strides": lambda x: x.numpy()[::-1].copy()[::-1],
    "unaligned": lambda x: unaligned(x.numpy()),
    "subclass": lambda x: x.numpy().view(np.recarray),
    "negated": lambda x: torch._neg_view(-x),
    "buffer": torch.nn.Buffer,
    "stubborn": lambda x: x.as_subclass(Stubborn),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(DISGUISES))
def test_the_same_values_in_disguise(name: str, backend: str) -> None:
    base, *experts = (DISGUISES[name](x) for x in (BASE, *EXPERTS))
    found = torch.as_tensor(merged(base, experts, backend=backend))
    assert type(found) is torch.Tensor
    assert torch.equal(found, EXPECTED)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_and_inference_tensors(backend: str) -> None:
    learned = [torch.nn.Parameter(x) for x in (BASE, *EXPERTS, FRESH)]
    refused(BackendError, "base requires a gradient", lambda: merged(learned[0], backend=backend))
    refused(BackendError, "out requires a gradient", lambda: merged(out=learned[-1], backend=backend))
    with torch.no_grad():
        assert torch.equal(merged(learned[0], learned[1:4], out=learned[4], backend=backend), EXPECTED)
    with torch.inference_mode():
        made, out = BASE.clone(), torch.empty(8, 4)
    assert torch.equal(merged(made, out=out, backend=backend), EXPECTED)
    assert not merged(made, backend=backend).is_inference()
    with torch.inference_mode():
        steps, out = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    assert merged(steps, [steps], out=out, backend=backend).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_torch_defaults_change_nothing(scope: str) -> None:
    with torch.device("meta"):
        found = merged({"a": BASE}, [{"a": x} for x in EXPERTS], scope=scope, backend="reference")
    assert torch.equal(found["a"], EXPECTED)


def resized(count: int) -> torch.Tensor:
    x = torch.ones(8)
    x.untyped_storage().resize_(count)
    return x


class Wrapper(torch.Tensor):  # type: ignore[misc]
    """A tensor in name only, as distributed and fake ones are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def quietly(make: Callable[[], Any]) -> Callable[[], Any]:
    """torch warns of every layout that it calls a prototype."""

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return call


EXOTIC: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: BASE.to("meta"), "lies on meta; expected a dense tensor"),
    "wrapper": (lambda: torch.Tensor._make_wrapper_subclass(Wrapper, (8, 4)), "is a Wrapper of layout"),
    "sparse": (BASE.to_sparse, "layout torch.sparse_coo"),
    "csr": (quietly(BASE.to_sparse_csr), "layout torch.sparse_csr"),
    "nested": (quietly(lambda: torch.nested.nested_tensor([BASE, BASE[:3]])), "expected a dense tensor"),
    "quantized": (
        quietly(lambda: torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8)),
        "has element type qint8",
    ),
    "freed": (lambda: resized(0), "memory of its own"),
    "cut short": (lambda: resized(4), "memory of its own"),
    "complex": (lambda: BASE.to(torch.complex128), "complex128; expected a float of 16, 32 or 64 bits"),
    "float8": (lambda: BASE.to(torch.float8_e5m2), "float8_e5m2"),
    "object": (lambda: ARRAYS[0].astype(object), "element type object"),
    "time": (lambda: np.zeros(3, "M8[s]"), "datetime64"),
    "structured": (lambda: np.zeros(3, [("a", "f4")]), "void32"),
    "masked": (lambda: np.ma.array(ARRAYS[0]), "is a masked array"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(EXOTIC))
def test_exotic_arrays_are_refused_by_every_backend(name: str, backend: str) -> None:
    make, text = EXOTIC[name]
    array = make()
    refused(BackendError, f"base .*{text}", lambda: merged(array, [array], backend=backend))
    named = {"w": array}
    refused(BackendError, f"tensor 'w': base .*{text}", lambda: merged(named, [named], backend=backend))


def test_transformed_tensors_are_refused() -> None:
    text = "base is a Tensor of layout torch.strided .* memory of its own"
    refused(BackendError, text, lambda: torch.vmap(lambda x: merged(x, [x]))(BASE))
    refused(BackendError, text, lambda: torch.func.grad(lambda x: merged(x).sum())(BASE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.int64, torch.uint16, torch.bool, np.int32])
def test_integers_must_agree(kind: Any, backend: str) -> None:
    make: Any = torch.tensor if isinstance(kind, torch.dtype) else np.array
    same, other = (make(values, dtype=kind) for values in ([1, 0, 1], [1, 1, 1]))
    assert merged(same, [same], backend=backend).tolist() == same.tolist()
    text = "expert 1 differs from base, but tensors of integers must be equal in all inputs"
    refused(BackendError, f"^{text}$", lambda: merged(same, [same, other], backend=backend))
    base, expert, out = ({"steps": steps} for steps in (same, other, make([0, 0, 0], dtype=kind)))
    text = "tensor 'steps': expert 1 differs"
    refused(BackendError, text, lambda: merged(base, [base, expert], out=out, backend=backend))
    assert not out["steps"].any()


def test_integers_do_not_merge_with_floats() -> None:
    whole = {"w": BASE.long()}
    text = "tensor 'w': expert 0 has element type int64, which does not merge with float32 of base"
    refused(BackendError, text, lambda: merged({"w": BASE}, [whole]))


# -- out ----------------------------------------------------------------------------------------------------

ROOM = np.zeros((8, 4), np.float32)
WRONG_OUTS: dict[str, tuple[Any, str]] = {
    "read-only": (read_only(ROOM), "out is read-only"),
    "big-endian": (ROOM.astype(">f4"), "out has the foreign byte order of >f4"),
    "transposed": (np.zeros((4, 8), np.float32).T, "out must be contiguous"),
    "unaligned": (unaligned(ROOM), "out must be contiguous and aligned"),
    "masked": (np.ma.array(ROOM), "out is a masked array"),
    "type": (np.zeros((8, 4)), "out must have shape .* element type float32, found .* float64"),
    "object": (ROOM.astype(object), "out has element type object"),
}


@pytest.mark.parametrize("name", list(WRONG_OUTS))
def test_wrong_outs(name: str) -> None:
    out, text = WRONG_OUTS[name]
    refused(BackendError, text, lambda: merged(ARRAYS[0], ARRAYS[1:], out=out))


def test_a_negated_out() -> None:
    refused(BackendError, "out must be contiguous", lambda: merged(out=torch._neg_view(FRESH)))


def test_out_apart_among_many() -> None:
    table, room = torch.zeros(3, 400, 2), torch.zeros(400, 2)
    base, expert, other = ({str(i): row for i, row in enumerate(part)} for part in table)
    out = {str(i): row for i, row in enumerate(room)}
    merged(base, [expert, other], out=out)
    out["7"] = out["399"]
    refused(
        BackendError,
        "tensor '399': out shares memory with another out",
        lambda: merged(base, [expert, other], out=out),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_odd_steps_of_axes_with_one_element(backend: str) -> None:
    x = np.arange(108, dtype=np.float32).reshape(1, 9, 12)[::-1]
    out = np.zeros((1, 9, 12), np.float32)[::-1]
    assert x.strides[0] < 0
    found = merge_tensors(x, [x * 2], backend=backend, density=0.5, out=out)
    assert found is out
    assert np.array_equal(out, merge_tensors(x.copy(), [x * 2], density=0.5))
