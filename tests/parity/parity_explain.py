"""Why elements of two results differ: each by an independent computation in float64, or unexplained."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from parity_blends import blended, spans
from parity_outcomes import UNIT, Flags, outcomes
from parity_run import Merged, Numbers

FAR = 2  # units in the last place
# Roundings that can add up, in half units of the largest partial result: ours came to 4 at most.
ROUNDINGS = 8
# How far coefficients computed from float32 norms, dots and angles lie from the exact ones: relatively, and
# where they are small (model_stock's, of directions at right angles) in units of a cosine.
COEFFICIENTS = 64 * UNIT
# Below this angle (radians) float32 cosines say nothing: they are 1 within sixteen roundings, those of a dot
# and two norms (with AVX-512 mergekit lost an angle of 0.0013).
SMALL_ANGLE = (2 * 16 * UNIT) ** 0.5
UNEXPLAINED = "unexplained"


def units_apart(a: torch.Tensor, b: torch.Tensor) -> NDArray[np.int64]:
    """How many numbers of their type lie between the elements, flat."""
    integers = torch.int32 if a.dtype.itemsize == 4 else torch.int16
    size = torch.iinfo(integers).max

    def ordered(x: torch.Tensor) -> NDArray[np.int64]:
        bits = x.reshape(-1).view(integers).numpy().astype(np.int64)
        order: NDArray[np.int64] = np.where(bits < 0, -(bits & size), bits)
        return order

    distance: NDArray[np.int64] = np.abs(ordered(a) - ordered(b))
    return distance


def flat(x: torch.Tensor) -> Numbers:
    """The elements in f64."""
    numbers: Numbers = x.reshape(-1).to(torch.float64).numpy()
    return numbers


def allowed_error(tensor: Merged, value: Numbers, size: Numbers) -> Numbers:
    """What roundings on the way, and one to a narrower output, may add up to."""
    dtype = tensor.ours.dtype
    last = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    allowed: Numbers = ROUNDINGS * UNIT * size + last * np.abs(value)
    return allowed


def explain(tensor: Merged) -> Counter[str]:
    """How many elements of both results lie far apart, by reason."""
    far = units_apart(tensor.ours, tensor.theirs) > FAR
    if not far.any():
        return Counter()
    return (_explain_blend if tensor.rule.blend else _explain_sum)(tensor, far)


def _explain_sum(tensor: Merged, left: Flags) -> Counter[str]:
    theirs, reasons = flat(tensor.theirs), Counter[str]()
    # mergekit takes both L1 sums of a rescale in float32, pairwise.
    rescaled = 2 * UNIT * np.log2(left.size) if tensor.rule.rescale else 0.0
    found = list(outcomes(tensor))
    for outcome in found:
        error = np.abs(theirs - outcome.value)
        allowed = allowed_error(tensor, outcome.value, outcome.size)
        for reason, more in (
            (outcome.reason, 0.0),
            (f"{outcome.reason}, float32 L1 sums", rescaled),
            (f"{outcome.reason}, weights that equal variances move", outcome.loose),
        ):
            met = left & outcome.possible & (error <= allowed + more * outcome.moving)
            reasons[reason] += int(met.sum())
            left = left & ~met
    reasons[UNEXPLAINED] += int(left.sum())
    return +reasons


def _explain_blend(tensor: Merged, left: Flags) -> Counter[str]:
    theirs, reasons = flat(tensor.theirs), Counter[str]()
    value, size = blended(tensor)
    allowed = allowed_error(tensor, value, size)
    met = left & (np.abs(theirs - value) <= allowed)
    reasons["rounding"] += int(met.sum())
    left = left & ~met
    moved = theirs if tensor.base is None else theirs - tensor.base
    for at, inputs, exact in spans(tensor) if left.any() else ():
        if not left[at].any():
            continue
        # The coefficients that mergekit must have used: its result lies in the span of the inputs.
        fine = np.maximum(allowed[at], 2.0**-140)
        used = np.linalg.lstsq(inputs / fine[:, None], moved[at] / fine, rcond=None)[0]
        met = left[at] & (np.abs(inputs @ used - moved[at]) <= allowed[at])
        if np.abs(used - exact).max() <= COEFFICIENTS * max(1.0, np.abs(exact).max()):
            reasons["coefficients from float32 norms and dots"] += int(met.sum())
        elif widest_angle(inputs) < SMALL_ANGLE:
            reasons["an angle too small for a float32 cosine"] += int(met.sum())
        else:
            continue
        left[at] &= ~met
    reasons[UNEXPLAINED] += int(left.sum())
    return +reasons


def widest_angle(inputs: Numbers) -> float:
    """The largest angle between two columns, by their difference: exact where it is small."""
    units = inputs / np.linalg.norm(inputs, axis=0)
    apart = np.linalg.norm(units[:, :, None] - units[:, None, :], axis=0)
    return float(2 * np.arcsin(np.minimum(1.0, apart.max() / 2)))


def ours_is_exact(tensor: Merged) -> bool:
    """Whether every element of ours is the exact value of pymerge's own rule, rounded on the way."""
    ours = flat(tensor.ours)
    if tensor.rule.blend:
        value, size = blended(tensor)
        return bool((np.abs(ours - value) <= allowed_error(tensor, value, size)).all())
    right = np.zeros(ours.shape, bool)
    for outcome in outcomes(tensor):
        if outcome.reason.startswith(("rounding", "equal variances")):
            allowed = allowed_error(tensor, outcome.value, outcome.size) + outcome.loose * outcome.moving
            right |= outcome.possible & (np.abs(ours - outcome.value) <= allowed)
    return bool(right.all())
