"""pymerge inside PEFT (0.19 and later): what add_weighted_adapter merges adapters with.

    with pymerge.integrations.peft.enable() as patches:
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged", combination_type="ties", density=0.2)
    print(patches.summary())

A whole adapter by `ties` or `magnitude_prune` is gathered and made in few calls (peft_batch). Of more than
four adapters, and for votes by frequency, pymerge only trims, and the rest is PEFT's own code. Results
have PEFT's bits, but for entries equal to a threshold, of which the first are kept (PEFT: any of them), and
the sign of zeros. `dare_linear` and `dare_ties` stay with PEFT, for torch's generator draws their entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

from pymerge.errors import BackendError, PymergeError
from pymerge.integrations import patches, peft_batch
from pymerge.integrations.calls import why_left
from pymerge.integrations.patches import Function, Left, Patches, Tally, patches_of
from pymerge.integrations.peft_batch import Gathering

if TYPE_CHECKING:
    from torch import Tensor

TOOL = "PEFT"
# Below so many elements PEFT is faster than a call of merge_tensors (0.3 ms), by magnitude and by sum.
SMALLEST_TRIM = 1 << 14
SMALLEST_SUM = 1 << 18
# What is left to PEFT: by intent, or because the arguments are of a kind not known.
LEFT_ERRORS = (Left, PymergeError, AttributeError, TypeError)
FUNCTIONS = ("dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties")


def enable() -> Patches:
    """Has PEFT merge adapters through pymerge until `disable()`, or for a `with` block; counts start at zero.

    What stays with PEFT is counted in `summary()`. Raises BackendError where PEFT is missing or unknown.
    """
    disable()
    utils, model = _modules()
    missing = [name for name in FUNCTIONS if not (hasattr(utils, name) and hasattr(model, name))]
    if missing:
        raise BackendError(f"this version of PEFT is not known: it has no {missing[0]}")
    ours: dict[str, Function] = {
        "ties": _ties,
        "magnitude_prune": _magnitude_prune,
        "task_arithmetic": _task_arithmetic,
    }
    made = Patches(TOOL)
    originals = {name: getattr(utils, name) for name in FUNCTIONS}
    running = peft_batch.patch(made, model, originals)
    for name in FUNCTIONS:
        merge = ours.get(name, _drawn)
        made.replace(utils, name, _maker(name, merge))
        # `model` has imported them by name, and puts results into `.data`, so no gradient is wanted.
        made.replace(model, name, _maker(name, _without_gradient(merge), running))
    return made


def disable() -> None:
    """Gives PEFT its own functions back; does nothing where they are in place."""
    patches.disable(_running())


def summary() -> str:
    """How many merges pymerge made and why it left the others, since `enable()`."""
    return patches.summary(_running(), TOOL)


def _running() -> Patches | None:
    return patches_of(_modules()[0], "ties")


def _modules() -> tuple[Any, Any]:
    """Where PEFT's functions are, and where they are called from."""
    try:
        import peft.tuners.lora.model
        import peft.utils.merge_utils
    except ImportError as error:
        raise BackendError(f"PEFT cannot be imported here ({error}); install it: pip install peft") from error
    return peft.utils.merge_utils, peft.tuners.lora.model


def _maker(
    name: str, ours: Function, running: ContextVar[Gathering | None] | None = None
) -> Callable[[Function, Tally], Function]:
    def make(original: Function, tally: Tally) -> Function:
        @wraps(original)
        def merge(*given: Any, **named: Any) -> Any:
            gathering = running.get() if running else None
            gathered = gathering.take(name, given, named) if gathering else None
            if gathered is not None:
                return gathered
            try:
                result = ours(*given, **named)
            except LEFT_ERRORS as reason:
                tally.leave(name, str(reason))
                return original(*given, **named)
            tally.make(name)
            return result

        return merge

    return make


def _without_gradient(ours: Function) -> Function:
    def merge(*given: Any, **named: Any) -> Any:
        import torch

        with torch.no_grad():
            return ours(*given, **named)

    return merge


def _ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    if majority_sign_method == "total" and _is_simple(task_tensors, weights):
        return _at_once("ties", task_tensors, weights, density)
    utils = _modules()[0]
    trimmed = _trimmed(task_tensors, density)
    agree = utils.calculate_majority_sign_mask(trimmed, method=majority_sign_method)
    weighted = trimmed * utils.reshape_weight_task_tensors(trimmed, weights)
    merged: Tensor = utils.disjoint_merge(weighted, agree)
    return merged


def _magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    if _is_simple(task_tensors, weights):
        return _at_once("magnitude_prune", task_tensors, weights, density)
    utils = _modules()[0]
    trimmed = _trimmed(task_tensors, density)
    weighted = trimmed * utils.reshape_weight_task_tensors(trimmed, weights)
    return weighted.sum(dim=0)


def _task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    import torch

    from pymerge.tensors import merge_tensors

    _check(task_tensors, SMALLEST_SUM)
    if len(task_tensors) > peft_batch.MOST_SUMMED:
        raise Left(f"more than {peft_batch.MOST_SUMMED} adapters")
    if not _is_simple(task_tensors, weights):
        raise Left("weights of another kind")
    return merge_tensors(
        None,
        task_tensors,
        method="linear",
        weight=weights.tolist(),
        normalize=False,
        out_dtype="float32",  # which 16-bit tensors times weights in float32 are in torch
        threads=torch.get_num_threads(),
    )


def _drawn(*given: Any, **named: Any) -> Tensor:
    raise Left("torch's generator draws")


def _is_simple(tensors: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether torch adds up so few in their order, and the weights are numbers in float32."""
    import torch

    if len(tensors) > peft_batch.MOST_SUMMED:
        return False
    plain = weights.dtype is torch.float32 and not weights.requires_grad
    return plain and weights.shape == (len(tensors),)


def _at_once(method: str, tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """A whole merge in one call, in float32, which 16-bit tensors times weights in float32 are in torch."""
    import torch

    _check_trim(tensors, density)
    result = torch.empty(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
    peft_batch.merge_at_once(method, [tensors], [result], weights.tolist(), density)
    if not peft_batch.is_finite(result):
        raise Left(peft_batch.NOT_FINITE)
    return result


def _trimmed(tensors: Sequence[Tensor], density: float) -> Tensor:
    """The int(density * n) largest entries of each, the first of equals, the rest zero; stacked."""
    import torch

    from pymerge.tensors import merge_tensors

    _check_trim(tensors, density)
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise Left(peft_batch.NOT_FINITE)
    stack = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, device=tensors[0].device)
    names = [str(k) for k in range(len(tensors))]
    # With one expert and a base of zeros ties is its trim; all tensors go in one call.
    merge_tensors(
        dict.fromkeys(names, torch.zeros_like(stack[0])),
        [dict(zip(names, tensors, strict=True))],
        method="ties",
        density=density,
        normalize=False,
        out=dict(zip(names, stack.unbind(), strict=True)),
        threads=torch.get_num_threads(),
    )
    return stack


def _check_trim(tensors: Sequence[Tensor], density: float) -> None:
    _check(tensors, SMALLEST_TRIM)
    if not 0 < density < 1 or int(density * tensors[0].numel()) == 0:
        raise Left("all or nothing is kept")


def _check(tensors: Sequence[Tensor], smallest: int) -> None:
    """Raises Left for tensors that belong to PEFT."""
    if not tensors:
        raise Left("no tensors")
    reason = why_left(tensors)
    if reason is not None:
        raise Left(reason)
    if tensors[0].numel() < smallest:
        raise Left("a small tensor")
