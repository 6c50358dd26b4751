"""The exact results of the blends, in f64, and how far mergekit's coefficients lie from the exact ones.

A blend stays in the span of its inputs, so columns of their QR decomposition stand for them: K numbers each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import blend_oracle as exact
import numpy as np
from parity_run import Merged, Numbers

from pymerge.rule import Blend, Blending, Rule, Vectors


class Span(NamedTuple):
    """One vector of a tensor: its elements `at`, its inputs as columns, and the exact coefficients."""

    at: slice
    inputs: Numbers
    coefficients: Numbers


def spans(tensor: Merged) -> Iterator[Span]:
    """The vectors that a blend takes one by one."""
    blending = tensor.rule.blend
    assert blending is not None
    deltas = np.stack([x if tensor.base is None else x - tensor.base for x in tensor.experts], axis=1)
    count, shape = len(deltas), tensor.ours.shape
    if blending.vectors is Vectors.ROWS:
        places = [slice(start, start + shape[-1]) for start in range(0, count, shape[-1])]
    elif blending.vectors is Vectors.COLUMNS:
        columns = count // shape[0]
        places = [slice(start, count, columns) for start in range(columns)]
    else:
        places = [slice(0, count)]
    for at in places:
        inputs = deltas[at]
        triangle = np.linalg.qr(inputs).R
        merged = _blended([list(map(float, column)) for column in triangle.T], tensor.rule, blending)
        yield Span(at, inputs, np.linalg.lstsq(triangle, np.array(merged), rcond=None)[0])


def _blended(vectors: list[exact.Vector], rule: Rule, blending: Blending) -> exact.Vector:
    if blending.kind is Blend.SLERP:
        return exact.slerp(vectors[0], vectors[1], blending.t)
    if blending.kind is Blend.NUSLERP:
        return exact.nuslerp(vectors[0], vectors[1], rule.weights)
    if blending.kind is Blend.KARCHER:
        return exact.karcher(vectors, blending.max_iter, blending.tol)
    if blending.kind is Blend.MODEL_STOCK:
        return exact.model_stock(vectors)
    merged = exact.multislerp(vectors, rule.weights, rule.normalize, blending.eps)
    assert merged is not None
    return merged


def blended(tensor: Merged) -> tuple[Numbers, Numbers]:
    """The exact result, and what rounding errors may be measured against."""
    value = np.zeros(tensor.experts[0].shape) if tensor.base is None else tensor.base.copy()
    size = np.abs(value)
    for at, inputs, coefficients in spans(tensor):
        value[at] += inputs @ coefficients
        size[at] += np.abs(inputs) @ np.abs(coefficients)
    return value, size
