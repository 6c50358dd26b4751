"""mergekit 0.1.4: what its tasks are asked for, read as calls of merge_tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from pymerge.integrations.calls import Call, attempt
from pymerge.integrations.mergekit_methods import arithmetic_name, check_drawn, check_rows
from pymerge.integrations.patches import Function, Left, Patches, Tally
from pymerge.methods import METHODS
from pymerge.rule import Trim

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[Any, "Tensor"]
Reader = Callable[[Any, Tensors], Call]


def patch(patches: Patches, methods: Any, strict: bool) -> None:
    """Replaces what the tasks compute. `strict`: nothing that draws at random."""
    from mergekit.merge_methods import (
        generalized_task_arithmetic,
        karcher,
        linear,
        model_stock,
        nuslerp,
        slerp,
    )

    def put(task: Any, name: str, read: Reader) -> None:
        patches.replace(task, "execute", lambda original, tally: _routed(original, tally, name, read))

    put(generalized_task_arithmetic.GTATask, "", partial(_arithmetic, strict=strict))
    put(karcher.KarcherTask, "karcher", _karcher)
    put(linear.LinearMergeTask, "linear", _linear)
    put(model_stock.ModelStockMergeTask, "model_stock", _model_stock)
    put(nuslerp.NuSlerpTask, "nuslerp", _nuslerp)
    put(slerp.SlerpTask, "slerp", _slerp)


def _routed(original: Function, tally: Tally, name: str, read: Reader) -> Function:
    """`original`, tried with pymerge first; mergekit passes its tensors by name."""

    @wraps(original)
    def execute(task: Any, tensors: Tensors, **rest: Any) -> Any:
        merged = attempt(tally, name or task.method.name(), lambda: read(task, tensors))
        return original(task, tensors=tensors, **rest) if merged is None else merged

    return execute


def _arithmetic(task: Any, tensors: Tensors, strict: bool) -> Call:
    name = arithmetic_name(task.method.consensus_method, task.method.sparsification_method)
    base = tensors[task.base_model]
    models = [model for model in tensors if model != task.base_model]
    if not models:
        raise Left("no experts")
    norm = task.rescale_norm
    if norm is not None and norm.value != "l1":
        raise Left(f"rescaled by {norm.value}")
    check_rows(name, base)
    given = [task.tensor_parameters[model] for model in models]
    _check_small(name, base.numel(), given)
    options: dict[str, Any] = {
        key: [parameters[key] for parameters in given]
        for key in ("weight", "density", "gamma", "epsilon")
        if all(key in parameters for parameters in given) and (key != "density" or METHODS[name].dense)
    }
    options |= {"normalize": task.normalize, "rescale": norm is not None, "lambda_": task.lambda_}
    drawn = check_drawn(name, strict)
    return Call(name, base, [tensors[model] for model in models], options, drawn=drawn)


def _check_small(name: str, count: int, given: list[Any]) -> None:
    """Left where 0.1.4 stops, or drops everything, because a share of the tensor is less than one entry."""
    trim = METHODS[name].trim
    for parameters in given:
        if trim is Trim.MAGNITUDE and int(parameters["density"] * count) == 0:
            raise Left("nothing would be kept")
        if trim is Trim.OUTLIERS and int(parameters["gamma"] * count) == 0:
            raise Left("no outliers")


def _karcher(task: Any, tensors: Tensors) -> Call:
    _check_several(tensors)
    return Call("karcher", None, list(tensors.values()), {"max_iter": task.max_iter, "tol": task.tol})


def _linear(task: Any, tensors: Tensors) -> Call:
    weights = [task.tensor_parameters[model]["weight"] for model in tensors]
    return Call("linear", None, list(tensors.values()), {"weight": weights, "normalize": task.normalize})


def _model_stock(task: Any, tensors: Tensors) -> Call:
    if len(tensors) < 3:
        raise Left("too few models")
    base = tensors[task.base_model]
    return Call("model_stock", base, _others(task, tensors), {"filter_wise": task.filter_wise})


def _nuslerp(task: Any, tensors: Tensors) -> Call:
    _check_several(tensors)
    models = [model for model in tensors if model != task.base_model]
    weights = [task.tensor_parameters[model]["weight"] for model in models]
    base = None if task.base_model is None else tensors[task.base_model]
    options = {"weight": weights, "nuslerp_flatten": task.flatten, "nuslerp_row_wise": task.row_wise}
    return Call("nuslerp", base, _others(task, tensors), options)


def _slerp(task: Any, tensors: Tensors) -> Call:
    _check_several(tensors)
    return Call("slerp", tensors[task.base_model], _others(task, tensors), {"t": task.t})


def _others(task: Any, tensors: Tensors) -> list[Tensor]:
    return [tensor for model, tensor in tensors.items() if model != task.base_model]


def _check_several(tensors: Tensors) -> None:
    if len(tensors) < 2:
        raise Left("a single model")
