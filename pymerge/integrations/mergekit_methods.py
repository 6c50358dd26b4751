"""mergekit 0.1.5: what its methods are asked for, read as calls of merge_tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pymerge.integrations.calls import Call, attempt
from pymerge.integrations.patches import Function, Left, Patches, Tally
from pymerge.methods import METHODS
from pymerge.rule import Trim

if TYPE_CHECKING:
    from torch import Tensor

Parameters = Mapping[str, Any]
Reader = Callable[[Any, Any, Parameters], Call]

# mergekit's sparsifiers, by the value of their enum.
TRIMS: Mapping[str | None, Trim] = MappingProxyType(
    {
        None: Trim.NONE,
        "magnitude": Trim.MAGNITUDE,
        "random": Trim.RANDOM,
        "magnitude_outliers": Trim.OUTLIERS,
        "della_magprune": Trim.RANKED,
    }
)
# Above so many elements mergekit takes the quartiles of arcee_fusion from a random sample.
ARCEE_SAMPLE = 1_000_000
_ARITHMETIC = ("weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask")


def patch(patches: Patches, methods: Any, strict: bool) -> None:
    """Replaces what `methods`, mergekit.merge_methods, computes. `strict`: nothing that draws at random."""
    from mergekit.merge_methods import base

    def arithmetic(method: Any, group: Any, parameters: Parameters) -> Call:
        return _arithmetic(method, group, parameters, strict)

    def functional(method: Any, group: Any, parameters: Parameters) -> Call:
        if strict and method.spec.name == "arcee_fusion" and group.tensors[0].numel() > ARCEE_SAMPLE:
            raise Left("strict, and another generator draws")
        return _functional(method, group, parameters)

    patches.replace(
        methods.GeneralizedTaskArithmeticMerge,
        "merge_group",
        lambda original, tally: _routed(original, tally, arithmetic),
    )
    patches.replace(
        base.FunctionalGroupMergeMethod,
        "merge_group",
        lambda original, tally: _routed(original, tally, functional),
    )
    patches.replace(
        methods.BatchedMergeMethod, "merge_batch", lambda original, tally: _routed(original, tally, _batched)
    )


def arithmetic_name(consensus: Any, sparsifier: Any) -> str:
    """The row of the table that elects and trims so. Raises Left where there is none."""
    consensus = getattr(consensus, "value", consensus)
    sparsifier = getattr(sparsifier, "value", sparsifier)
    if consensus in (None, "sum") and sparsifier in TRIMS:
        trim, elect = TRIMS[sparsifier], consensus is not None
        for row in METHODS.values():
            if (row.trim, row.elect) == (trim, elect) and row.scales and row.fuse is None:
                return row.name
    raise Left("a method that pymerge does not know")


def check_drawn(method: str, strict: bool) -> bool:
    """Whether `method` draws at random. Raises Left where it does and must not."""
    drawn = METHODS[method].trim.drawn
    if drawn and strict:
        raise Left("strict, and another generator draws")
    return drawn


def check_rows(method: str, tensor: Tensor) -> None:
    """Left where mergekit's rows are not along the last axis, or hold one entry."""
    if METHODS[method].trim is Trim.RANKED and (tensor.ndim not in (1, 2) or tensor.shape[-1] < 2):
        raise Left("rows of one entry, or of more than two axes")


def _routed(original: Function, tally: Tally, read: Reader) -> Function:
    """`original`, tried with pymerge first."""

    @wraps(original)
    def route(method: Any, given: Any, /, **parameters: Any) -> Any:
        name = getattr(getattr(method, "spec", None), "name", type(method).__name__)
        merged = attempt(tally, name, lambda: read(method, given, parameters))
        return original(method, given, **parameters) if merged is None else merged

    return route


def _arithmetic(method: Any, group: Any, parameters: Parameters, strict: bool) -> Call:
    name = arithmetic_name(method.consensus_method, method.sparsification_method)
    _check_known(parameters, _ARITHMETIC)
    base, experts = _origin(group), group.non_base
    if base is None:
        raise Left("no base")
    if not experts:
        raise Left("no experts")
    check_rows(name, base)
    options: dict[str, Any] = {
        key: [parameters[key][entry.id] for entry in experts]
        for key in ("weight", "density", "gamma", "epsilon")
        if key in parameters and (key != "density" or METHODS[name].dense)
    }
    options |= {"lambda_": parameters["lambda"]}
    options |= {key: parameters[key] for key in ("normalize", "rescale")}
    drawn = check_drawn(name, strict)
    return Call(name, base, [entry.tensor for entry in experts], options, drawn=drawn)


def _functional(method: Any, group: Any, parameters: Parameters) -> Call:
    name = method.spec.name
    if not str(method.implementation.__module__).startswith("mergekit.") or name not in _FUNCTIONAL:
        raise Left("a method that is mergekit's own")
    return _FUNCTIONAL[name](group, parameters)


def _karcher(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("max_iter", "tol"))
    return Call("karcher", None, list(group.tensors), dict(parameters))


def _model_stock(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("filter_wise",))
    return Call("model_stock", _origin(group), _experts(group), dict(parameters))


def _sce(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("int8_mask", "select_topk"))
    return Call("sce", _origin(group), _experts(group), {"select_topk": parameters["select_topk"]})


def _ram(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("epsilon",))
    return Call("ram", _origin(group), _experts(group), dict(parameters))


def _ramplus_tl(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("epsilon", "r", "alpha"))
    return Call("ramplus_tl", _origin(group), _experts(group), dict(parameters))


def _nearswap(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("t",))
    return Call("nearswap", _origin(group), _experts(group), dict(parameters))


def _arcee_fusion(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ())
    # mergekit's result is float32 whatever the inputs are.
    return Call("arcee_fusion", _origin(group), _experts(group), {"out_dtype": "float32"})


def _nuslerp(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("weight", "nuslerp_row_wise", "nuslerp_flatten"))
    return _weighted("nuslerp", group, parameters)


def _multislerp(group: Any, parameters: Parameters) -> Call:
    _check_known(parameters, ("weight", "normalize_weights", "eps"))
    if len(group.non_base) < 2:
        raise Left("nothing to blend")
    return _weighted("multislerp", group, parameters)


_FUNCTIONAL: Mapping[str, Callable[[Any, Parameters], Call]] = MappingProxyType(
    {
        "arcee_fusion": _arcee_fusion,
        "karcher": _karcher,
        "model_stock": _model_stock,
        "multislerp": _multislerp,
        "nearswap": _nearswap,
        "nuslerp": _nuslerp,
        "ram": _ram,
        "ramplus_tl": _ramplus_tl,
        "sce": _sce,
    }
)


def _weighted(name: str, group: Any, parameters: Parameters) -> Call:
    weights = [parameters["weight"][entry.id] for entry in group.non_base]
    return Call(name, _origin(group), _experts(group), {**parameters, "weight": weights})


def _batched(method: Any, batch: Any, parameters: Parameters) -> Call:
    """linear and slerp: each of `batch.tensors` stacks one input of several merges along its first axis."""
    name = method.spec.name
    if not str(method.implementation.__module__).startswith("mergekit.") or name not in ("linear", "slerp"):
        raise Left("a method that is mergekit's own")
    if name == "linear":
        _check_known(parameters, ("weight", "normalize"))
        options = {"weight": _same(parameters["weight"]), "normalize": parameters.get("normalize")}
        return Call(name, None, batch.tensors, options, stacked=True)
    _check_known(parameters, ("t",))
    first, second = batch.tensors if batch.base_index == 0 else reversed(batch.tensors)
    return Call(name, first, [second], {"t": _same(parameters["t"])}, stacked=True)


def _same(values: Tensor) -> Any:
    """The parameter that all merges of a batch share. Raises Left where they differ."""
    if values.requires_grad:
        raise Left("a gradient is wanted")
    rows = values.tolist()
    if any(row != rows[0] for row in rows):
        raise Left("parameters that differ within a batch")
    return rows[0]


def _origin(group: Any) -> Tensor | None:
    base = group.base
    return None if base is None else base.tensor


def _experts(group: Any) -> list[Tensor]:
    return [entry.tensor for entry in group.non_base]


def _check_known(parameters: Parameters, known: tuple[str, ...]) -> None:
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise Left(f"unknown parameters: {', '.join(unknown)}")
