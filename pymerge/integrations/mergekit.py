"""pymerge inside mergekit: 0.1.5, and 0.1.4, told apart by what they offer.

    with pymerge.integrations.mergekit.enable() as patches:
        ...                       # mergekit's own functions, unchanged
    print(patches.summary())

Results have mergekit's shapes, types and devices. They are rounded once, where mergekit rounds 16-bit types
at every step: the last places differ, and so may what is trimmed or elected where entries are that close.
Of entries equal to a threshold the first are kept (mergekit: any of them). DARE and DELLA follow
torch.manual_seed but draw other entries than mergekit, in the same shares; `strict` leaves them to mergekit.
"""

from __future__ import annotations

from typing import Any

from pymerge.errors import BackendError
from pymerge.integrations import patches
from pymerge.integrations.patches import Patches, patches_of

TOOL = "mergekit"


def enable(*, strict: bool = False) -> Patches:
    """Has mergekit merge through pymerge until `disable()`, or for a `with` block; counts start at zero.

    `strict`: methods that draw at random stay with mergekit. So do, in any case and counted in `summary()`:
    merges that want a gradient, classes of tensors of others, float64, and whatever is unknown.
    Raises BackendError where mergekit is missing or offers nothing that is known.
    """
    disable()
    methods = _methods()
    made = Patches(TOOL)
    if hasattr(methods, "register"):
        from pymerge.integrations.mergekit_methods import patch
    else:
        from pymerge.integrations.mergekit_tasks import patch
    try:
        patch(made, methods, strict)
    except (AttributeError, ImportError) as error:
        made.disable()
        raise BackendError(f"this version of mergekit is not known: {error}") from error
    return made


def disable() -> None:
    """Gives mergekit its own functions back; does nothing where they are in place."""
    patches.disable(_running())


def summary() -> str:
    """How many merges pymerge made and why it left the others, since `enable()`."""
    return patches.summary(_running(), TOOL)


def _running() -> Patches | None:
    methods = _methods()
    if hasattr(methods, "register"):
        return patches_of(methods.GeneralizedTaskArithmeticMerge, "merge_group")
    from mergekit.merge_methods.generalized_task_arithmetic import GTATask

    return patches_of(GTATask, "execute")


def _methods() -> Any:
    try:
        import mergekit.merge_methods
    except ImportError as error:
        raise BackendError(
            f"mergekit cannot be imported here ({error}); install it: pip install mergekit"
        ) from error
    return mergekit.merge_methods
