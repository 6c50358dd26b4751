"""The specification, in torch: what every compiled backend must reproduce bit for bit.

Read it from top to bottom. One group of tensors goes through

    round_to (cast) -> task vectors -> trim (select) -> rescale -> elect -> combine -> round_to (output)

The numerics contract, per element, experts k = 0..K-1 in recipe order. The working type is f32 for f16, bf16
and f32 inputs; it is f64 as soon as one input of the tensor (after `cast`) is f64. Weights and lambda are
rounded to the working type first. Every operation is rounded once, to nearest even; nothing is fused,
nothing is flushed to zero, no sum over k is reordered.

    d_k    = x_k - b
    keep_k = trim rule on m_k = bits(|d_k|) as an unsigned integer, and on the index where those are equal
    v_k    = d_k * w_k                     or, with rescale, (d_k * scale_k) * w_k: two roundings
    S      = sum of v_k over kept k        sequential in k from +0
    side   = + if S >= 0 else -
    num    = sum of v_k, den = sum of w_k  over kept k with v_k > 0 (side +) or v_k < 0 (side -), sequential
             with late weights the sum of v_k * u_k, a rounding more: u_k neither votes nor divides
    den    = 1 if den == 0                 v_k == 0 never counts
    out    = round_to_out_dtype(b + lambda * (num / den  or, without normalize, num))

Methods that do not elect: num = sum of v_k over kept k, den = sum of all w_k, 1 if |den| < 1e-8 (compared in
the working type). `linear` has no base, no trim and no lambda: out = round(sum of x_k * w_k [/ sum of w_k]).

NaN. S is NaN as soon as a kept value is NaN (or +inf meets -inf), and then out is NaN. A trimmed value,
finite or not, takes no part; infinities follow IEEE. Output NaNs are one positive quiet pattern: bf16 0x7FC0,
f16 0x7E00, f32 0x7FC00000, f64 0x7FF8000000000000.

Trim by magnitude. k = int(density * n), a double product truncated, at least 1 if density > 0, and one more
(but at most n) with `one_more`; density >= 1 keeps all (no trim, no rescale), density <= 0 keeps none. All
NaNs are one magnitude, above infinity (payloads do not survive every processor's subtraction). FIRST keeps
exactly k, the lowest flat index first among equals: a stable descending sort. ALL keeps every magnitude >=
the k-th largest. Scope TENSOR counts n over one tensor; scope MODEL over all tensors together, flat index =
tensors in sorted name order, one threshold per expert; where working types differ, magnitudes are compared as
f64, which widening leaves exact.

Trim with outliers. kept = int(density * n), outliers = min(int(gamma * n), n - kept); density >= 1 keeps
all. Of the outliers + kept largest magnitudes, in the order above, the outliers are dropped; kept = 0 keeps
none.

Trim at random. Keep iff the Philox word of (seed, name, index, expert) is below floor(density * 2^32).
RANKED: the density of an entry is (density - epsilon) + (2 * epsilon) * rank / (m - 1) in f64, its rank by
magnitude in its row of m (last axis; a tensor without one is one row) from 0 to m - 1; where m = 1, 0.5 for
the quotient; of equal magnitudes the lowest index has the highest rank. density >= 1 keeps all, <= 0 none.

Trim by scores. One score for each element, one mask for all experts. VARIANCE: mean_k (d_k - mean d)^2 in the
working type, each sum sequential in k; kept are the int(density * n) largest, n counting the scores that are
not zero, in the order above. IMPORTANCE: |x - b| times the divergence of softmax(x) from softmax(b) over the
row (`scores.py`); kept is what reaches the median plus 1.5 * (upper - lower quartile), quartile q being the
score of ascending rank (n - 1) * q / 4.

Fuse. Entries become one by a formula of `fuse.py` instead of elect and combine.

Blend. The coefficients c_k come from the inputs: G_ij, the f64 products of x_i and x_j (of d_i and d_j where
there is a base) summed in the fixed order of `ordered_sum`, then a formula of `blend.py` in f64. A result is
round(sum of x_k * c_k), or round(b + sum of d_k * c_k) so that small updates are not lost in the base: c_k
rounded to the working type first, every operation once, sequential in k from +0. Vectors ROWS and COLUMNS do
so for each row (last axis) or column (first axis) as if it were a tensor.

Copy. Where cast and output have the input's type the result is the input, NaNs and signs of zero included.

Rescale. scale_k = sum|d| / sum|kept d| per tensor and expert, both sums f64 in a fixed order (`ordered_sum`),
the quotient taken in f64 and rounded to the working type; 1 if either sum < 1e-7, or
where nothing is trimmed (density >= 1, or a method without a trim).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pymerge.backends.blend import coefficients
from pymerge.backends.fuse import fuse_tensor
from pymerge.backends.philox import element_words, keep_below, tensor_key
from pymerge.backends.rounding import canonical_nan, in_working_type, magnitude, prepare, round_to
from pymerge.backends.scores import (
    first_largest,
    importance,
    keep_fence,
    keep_variance,
    ranked_limits,
    variance,
)
from pymerge.backends.sums import ordered_sum
from pymerge.errors import CheckpointError
from pymerge.rule import Blending, Rule, Scope, ThresholdTies, Trim, Vectors

TINY_SUM = 1e-7
TINY_WEIGHT = 1e-8


def merge_group(
    names: Sequence[str],
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    rule: Rule,
    out_dtypes: Sequence[torch.dtype],
    cast: torch.dtype | None = None,
) -> list[Tensor]:
    """Merges one group of tensors; results come in the order of `names`, with the shapes of the inputs.

    `experts[i][k]` is tensor i of expert k, `bases[i]` its base (None for linear). `cast`: inputs are rounded
    to it first. Scope MODEL takes one threshold over the group; scope TENSOR treats each tensor alone.
    Inputs are not modified. Raises ValueError when base and rule, or the numbers of experts, do not agree,
    CheckpointError where a blend has no result.
    """
    check_group(names, bases, experts, rule)
    if not names:
        return []
    shapes = [xs[0].shape for xs in experts]
    inputs = [[prepare(x, cast) for x in xs] for xs in experts]
    if rule.copy and all(
        (xs[0].dtype, cast or dtype) == (dtype, dtype) for xs, dtype in zip(experts, out_dtypes, strict=True)
    ):
        return [xs[0].detach().clone() for xs in experts]
    if rule.blend is not None:
        origins: Sequence[Tensor | None] = [None] * len(names) if bases is None else bases
        merged = [
            blend_tensor(name, b if b is None else prepare(b, cast), xs, shape, rule, rule.blend)
            for name, b, xs, shape in zip(names, origins, inputs, shapes, strict=True)
        ]
    elif bases is None:
        merged = [combine_linear(in_working_type(xs), rule) for xs in inputs]
    else:
        with_base = [in_working_type([prepare(b, cast), *xs]) for b, xs in zip(bases, inputs, strict=True)]
        deltas = [[x - b for x in xs] for b, *xs in with_base]
        kept = trim(names, with_base, deltas, shapes, rule)
        merged = [
            fuse_tensor(b, xs, ds, keep, rule) if rule.fuse else combine(b, ds, keep, rule)
            for (b, *xs), ds, keep in zip(with_base, deltas, kept, strict=True)
        ]
    return [
        canonical_nan(round_to(out, dtype)).reshape(shape)
        for out, dtype, shape in zip(merged, out_dtypes, shapes, strict=True)
    ]


def check_group(
    names: Sequence[str], bases: Sequence[Tensor] | None, experts: Sequence[Sequence[Tensor]], rule: Rule
) -> None:
    """Raises ValueError for a group that the rule does not describe."""
    if rule.task_vector != (bases is not None):
        raise ValueError(
            f"a rule with task_vector={rule.task_vector} met bases={'no' if bases is None else 'given'}"
        )
    if len(experts) != len(names) or (bases is not None and len(bases) != len(names)):
        raise ValueError(f"{len(names)} names came with {len(experts)} lists of experts")
    for name, xs in zip(names, experts, strict=True):
        if not len(xs) == len(rule.weights) == len(rule.densities) > 0:
            raise ValueError(
                f"tensor {name!r} has {len(xs)} experts, the rule {len(rule.weights)} weights "
                f"and {len(rule.densities)} densities"
            )


# -- trim ---------------------------------------------------------------------------------------------------


def trim(
    names: Sequence[str],
    with_base: Sequence[Sequence[Tensor]],
    deltas: Sequence[Sequence[Tensor]],
    shapes: Sequence[torch.Size],
    rule: Rule,
) -> list[list[Tensor]]:
    """Which entries take part: one bool mask per tensor and expert, shaped as `deltas`.

    `with_base`: the base and the experts of each tensor, in the working type.
    """
    if rule.trim.by_magnitude and rule.scope is Scope.MODEL:
        return trim_model(names, deltas, rule)
    if rule.trim.scored:
        masks = [
            trim_scored(b, x, ds, rule, row(shape))
            for (b, x, *_), ds, shape in zip(with_base, deltas, shapes, strict=True)
        ]
        return [[mask] * len(ds) for mask, ds in zip(masks, deltas, strict=True)]
    return [
        [trim_one(name, k, d, rule, row(shape)) for k, d in enumerate(ds)]
        for name, ds, shape in zip(names, deltas, shapes, strict=True)
    ]


def row(shape: torch.Size) -> int:
    """Elements of a row: the last axis, or the one element of a tensor without axes."""
    return shape[-1] if shape else 1


def trim_scored(base: Tensor, expert: Tensor, deltas: Sequence[Tensor], rule: Rule, row: int) -> Tensor:
    """The mask of all experts; `expert`: the one model of a merge by importance."""
    if rule.trim is Trim.IMPORTANCE:
        return keep_fence(magnitude(importance(base, expert, deltas[0], row)), base.dtype)
    scores = magnitude(variance(deltas))
    if rule.densities[0] >= 1:
        return torch.ones_like(scores, dtype=torch.bool)
    return keep_variance(scores, rule.densities[0])


def trim_one(name: str, expert: int, d: Tensor, rule: Rule, row: int = 0) -> Tensor:
    """The mask of one expert's task vector for one tensor; `row`: elements of a row, if ranks go by them."""
    density = rule.densities[expert]
    if rule.trim is Trim.NONE or density >= 1:
        return torch.ones_like(d, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(d, dtype=torch.bool)
    if rule.trim.drawn:
        words = element_words(tensor_key(rule.seed, name), expert, d.numel())
        if rule.trim is Trim.RANDOM:
            return torch.from_numpy(words < keep_below(density)).to(d.device)
        limits = ranked_limits(magnitude(d), row, density, rule.epsilons[expert])
        return torch.from_numpy(words.astype("int64")).to(d.device) < limits
    if rule.trim is Trim.OUTLIERS:
        return select_between(magnitude(d), density, rule.gammas[expert], rule.threshold_ties)
    return select(magnitude(d), density, rule.threshold_ties, rule.one_more)


def trim_model(names: Sequence[str], deltas: Sequence[Sequence[Tensor]], rule: Rule) -> list[list[Tensor]]:
    """Scope MODEL: the tensors, in sorted name order, trimmed as if they were one."""
    order = sorted(range(len(names)), key=lambda i: names[i])
    kept: list[list[Tensor]] = [[] for _ in names]
    for k in range(len(rule.densities)):
        widest = max((ds[k].dtype for ds in deltas), key=lambda dtype: dtype.itemsize)
        flat = torch.cat([deltas[i][k].to(widest) for i in order])
        mask = trim_one("", k, flat, rule)
        ends = accumulate((deltas[i][k].numel() for i in order), initial=0)
        for i, (begin, end) in zip(order, pairwise(ends), strict=True):
            kept[i].append(mask[begin:end])
    return kept


def select(magnitudes: Tensor, density: float, ties: ThresholdTies, one_more: bool = False) -> Tensor:
    """The mask of the k largest magnitudes, k = int(density * n) and at least 1; density in (0, 1)."""
    n = magnitudes.numel()
    k = int(density * n) + 1 if one_more else max(1, int(density * n))
    return largest(magnitudes, min(k, n), ties)


def select_between(magnitudes: Tensor, density: float, gamma: float, ties: ThresholdTies) -> Tensor:
    """The mask of the int(density * n) largest below the outliers; density in (0, 1)."""
    n = magnitudes.numel()
    kept = int(density * n)
    outliers = min(int(gamma * n), n - kept)
    if kept == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    return largest(magnitudes, outliers + kept, ties) & ~largest(magnitudes, outliers, ties)


def largest(magnitudes: Tensor, k: int, ties: ThresholdTies) -> Tensor:
    """The mask of the k largest magnitudes, or with ALL of every one that reaches the k-th."""
    if ties is ThresholdTies.FIRST or k == 0 or magnitudes.numel() == 0:
        return first_largest(magnitudes, k)
    return magnitudes >= torch.sort(magnitudes, descending=True)[0][k - 1]


# -- rescale ------------------------------------------------------------------------------------------------


def rescale(d: Tensor, keep: Tensor, density: float) -> Tensor:
    """What a task vector is multiplied by so that trimming leaves its L1 norm; a scalar of d's type."""
    one = torch.ones((), dtype=d.dtype, device=d.device)
    if density >= 1:
        return one
    size = d.abs().to(torch.float64)
    before = ordered_sum(size)
    after = ordered_sum(torch.where(keep, size, 0.0))
    if before < TINY_SUM or after < TINY_SUM:
        return one
    return (before / after).to(d.dtype)


# -- blend --------------------------------------------------------------------------------------------------


def blend_tensor(
    name: str, base: Tensor | None, inputs: Sequence[Tensor], shape: torch.Size, rule: Rule, blend: Blending
) -> Tensor:
    """One merged tensor in the working type, by coefficients that come from the inputs."""
    if base is None:
        origin, deltas = None, in_working_type(inputs)
    else:
        origin, *experts = in_working_type([base, *inputs])
        deltas = [x - origin for x in experts]
    if deltas[0].numel() == 0:
        return deltas[0]
    parts = [vectors_of(d, shape, blend.vectors) for d in deltas]
    found = [coefficients(rule, matrix) for matrix in gram(parts).tolist()]
    if None in found:
        raise CheckpointError(
            f"tensor {name!r}: the weighted directions of the inputs cancel, so they have no mean;"
            " change a weight"
        )
    factors = torch.tensor(found, dtype=torch.float64).to(parts[0])
    merged = torch.zeros_like(parts[0])
    for k, part in enumerate(parts):
        merged = merged + part * factors[:, k, None]
    flat = (merged.t() if blend.vectors is Vectors.COLUMNS else merged).reshape(-1)
    return flat if origin is None else origin + flat


def vectors_of(x: Tensor, shape: torch.Size, vectors: Vectors) -> Tensor:
    """The vectors of a flat tensor that has the shape `shape`, as the rows of a matrix."""
    if vectors is Vectors.COLUMNS:
        return x.view(shape[0] if shape else 1, -1).t()
    return x.view(-1, shape[-1] if shape and vectors is Vectors.ROWS else x.numel())


def gram(parts: Sequence[Tensor]) -> Tensor:
    """All inner products of K inputs, f64, [V, K, K] for V vectors each."""
    wide = torch.stack([part.to(torch.float64) for part in parts])
    products = torch.zeros((wide.shape[1], len(parts), len(parts)), dtype=torch.float64, device=wide.device)
    for i, part in enumerate(wide):
        row = ordered_sum(part * wide[i:]).t()
        products[:, i, i:] = row
        products[:, i:, i] = row
    return products


# -- elect and combine --------------------------------------------------------------------------------------


def elect(values: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The sum of the kept values, and which kept values are on its side (zeros are on neither)."""
    mass = torch.zeros_like(values[0])
    for v, keep in zip(values, kept, strict=True):
        mass = mass + torch.where(keep, v, 0.0)
    positive = mass >= 0
    agree = [keep & torch.where(positive, v > 0, v < 0) for v, keep in zip(values, kept, strict=True)]
    return mass, agree


def combine(base: Tensor, deltas: Sequence[Tensor], kept: Sequence[Tensor], rule: Rule) -> Tensor:
    """One merged tensor in the working type: the base plus lambda times the merged task vector."""
    weights = [base.new_tensor(w) for w in rule.weights]
    values = [
        (d * rescale(d, keep, density) if rule.rescale and rule.trim is not Trim.NONE else d) * w
        for d, keep, density, w in zip(deltas, kept, rule.densities, weights, strict=True)
    ]
    mass = None
    if rule.elect:
        mass, kept = elect(values, kept)
        if rule.late_weights:
            values = [v * base.new_tensor(u) for v, u in zip(values, rule.late_weights, strict=True)]
    num, den = torch.zeros_like(base), torch.zeros_like(base)
    for v, keep, w in zip(values, kept, weights, strict=True):
        num = num + torch.where(keep, v, 0.0)
        den = den + (torch.where(keep, w, 0.0) if rule.elect else w)
    if rule.normalize:
        empty = den == 0 if rule.elect else den.abs() < base.new_tensor(TINY_WEIGHT)
        num = num / torch.where(empty, 1.0, den)
    out = base + num * base.new_tensor(rule.lambda_)
    return out if mass is None else torch.where(torch.isnan(mass), torch.nan, out)


def combine_linear(inputs: Sequence[Tensor], rule: Rule) -> Tensor:
    """The weighted sum, or mean, of whole tensors in the working type: no base, no trim, no lambda."""
    num = torch.zeros_like(inputs[0])
    den = torch.zeros_like(inputs[0])
    for x, weight in zip(inputs, rule.weights, strict=True):
        w = num.new_tensor(weight)
        num = num + x * w
        den = den + w
    return num / den if rule.normalize else num
