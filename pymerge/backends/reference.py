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
    den    = 1 if den == 0                 v_k == 0 never counts
    out    = round_to_out_dtype(b + lambda * (num / den  or, without normalize, num))

Methods that do not elect: num = sum of v_k over kept k, den = sum of all w_k, 1 if |den| < 1e-8 (compared in
the working type). `linear` has no base, no trim and no lambda: out = round(sum of x_k * w_k [/ sum of w_k]).

NaN. S is NaN as soon as a kept value is NaN (or +inf meets -inf), and then out is NaN. A trimmed value,
finite or not, takes no part; infinities follow IEEE. Output NaNs are one positive quiet pattern: bf16 0x7FC0,
f16 0x7E00, f32 0x7FC00000, f64 0x7FF8000000000000.

Trim by magnitude. k = int(density * n), a double product truncated, at least 1 if density > 0; density >= 1
keeps all (no trim, no rescale), density <= 0 keeps none. All NaNs are one magnitude, above infinity
(payloads do not survive every processor's subtraction). FIRST keeps exactly k, the lowest flat index first
among equals: a stable descending sort. ALL keeps every magnitude >= the k-th largest. Scope TENSOR counts n
over one tensor; scope MODEL over all tensors together, flat index = tensors in sorted name order, one
threshold per expert; where working types differ, magnitudes are compared as f64, which widening leaves exact.

Trim with outliers. kept = int(density * n), outliers = min(int(gamma * n), n - kept); density >= 1 keeps
all. Of the outliers + kept largest magnitudes, in the order above, the outliers are dropped; kept = 0 keeps
none.

Trim at random. Keep iff the Philox word of (seed, name, index, expert) is below floor(density * 2^32).

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
from pymerge.backends.philox import element_words, keep_below, tensor_key
from pymerge.errors import CheckpointError
from pymerge.rule import Blending, Rule, Scope, ThresholdTies, Trim, Vectors

REDUCTION_BLOCK = 65_536
REDUCTION_LANES = 16
TINY_SUM = 1e-7
TINY_WEIGHT = 1e-8

# The integer type of the same width, and the one NaN that may leave: positive and quiet.
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
CANONICAL_NAN = {
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
SIGN_CLEARED = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}


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
        kept = trim(names, deltas, rule)
        merged = [combine(b, d, keep, rule) for (b, *_), d, keep in zip(with_base, deltas, kept, strict=True)]
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


# -- types and bits -----------------------------------------------------------------------------------------


def prepare(x: Tensor, cast: torch.dtype | None) -> Tensor:
    """An input as a flat tensor, rounded to `cast` when there is one."""
    flat = x.detach().reshape(-1)
    return flat if cast is None else round_to(flat, cast)


def in_working_type(inputs: Sequence[Tensor]) -> list[Tensor]:
    """All inputs of one tensor, widened (exactly) to f64 if one of them is f64, else to f32."""
    working = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [x.to(working) for x in inputs]


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, rounded once, to nearest even."""
    if x.dtype == torch.float64 and dtype in (torch.bfloat16, torch.float16):
        x = round_to_odd_f32(x)  # torch goes by way of f32 and would round twice
    return x.to(dtype)


def round_to_odd_f32(x: Tensor) -> Tensor:
    """f64 to f32 so that a second rounding to 16 bits gives what one rounding would have given.

    An inexact result becomes the neighbour with an odd last bit, so it never looks like a halfway case.
    """
    nearest = x.to(torch.float32)
    bits = nearest.view(torch.int32)
    back = nearest.to(torch.float64)
    move = (back != x) & ~torch.isnan(x) & (bits & 1 == 0)
    toward_x = torch.where(back.abs() < x.abs(), 1, -1).to(
        torch.int32
    )  # in magnitude: bits are sign-magnitude
    return torch.where(move, bits + toward_x, bits).view(torch.float32)


def canonical_nan(x: Tensor) -> Tensor:
    """`x` with every NaN replaced by the one positive quiet NaN of its type."""
    nan = torch.tensor(CANONICAL_NAN[x.dtype], dtype=BITS[x.dtype], device=x.device)
    return torch.where(torch.isnan(x), nan, x.view(BITS[x.dtype])).view(x.dtype)


def magnitude(d: Tensor) -> Tensor:
    """m = bits(|d|) as an integer that orders like |d|, with all NaNs equal and highest."""
    bits = d.view(BITS[d.dtype]) & SIGN_CLEARED[d.dtype]
    return bits.clamp(max=CANONICAL_NAN[d.dtype])


# -- trim ---------------------------------------------------------------------------------------------------


def trim(names: Sequence[str], deltas: Sequence[Sequence[Tensor]], rule: Rule) -> list[list[Tensor]]:
    """Which entries take part: one bool mask per tensor and expert, shaped as `deltas`."""
    if rule.trim.by_magnitude and rule.scope is Scope.MODEL:
        return trim_model(names, deltas, rule)
    return [
        [trim_one(name, k, d, rule) for k, d in enumerate(ds)] for name, ds in zip(names, deltas, strict=True)
    ]


def trim_one(name: str, expert: int, d: Tensor, rule: Rule) -> Tensor:
    """The mask of one expert's task vector for one tensor."""
    density = rule.densities[expert]
    if rule.trim is Trim.NONE or density >= 1:
        return torch.ones_like(d, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(d, dtype=torch.bool)
    if rule.trim is Trim.RANDOM:
        words = element_words(tensor_key(rule.seed, name), expert, d.numel())
        return torch.from_numpy(words < keep_below(density)).to(d.device)
    if rule.trim is Trim.OUTLIERS:
        return select_between(magnitude(d), density, rule.gammas[expert], rule.threshold_ties)
    return select(magnitude(d), density, rule.threshold_ties)


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


def select(magnitudes: Tensor, density: float, ties: ThresholdTies) -> Tensor:
    """The mask of the k largest magnitudes, k = int(density * n) and at least 1; density in (0, 1)."""
    return largest(magnitudes, max(1, int(density * magnitudes.numel())), ties)


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
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    if k == 0 or magnitudes.numel() == 0:
        return mask
    descending, index = torch.sort(magnitudes, descending=True, stable=True)
    if ties is ThresholdTies.ALL:
        return magnitudes >= descending[k - 1]
    mask[index[:k]] = True
    return mask


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


def ordered_sum(x: Tensor) -> Tensor:
    """The f64 sums over the last axis of an f64 tensor, in the one order that all backends use.

    Element i of a block of 65,536 adds to lane i % 16 in index order; the lanes of a block add up in order
    0..15; the blocks add up in index order. Padding with +0 changes no bit of a sum that starts at +0.
    """
    *lead, size = x.shape
    total = torch.zeros(lead, dtype=torch.float64, device=x.device)
    rows = min(REDUCTION_BLOCK, -(-size // REDUCTION_LANES) * REDUCTION_LANES) // REDUCTION_LANES
    if rows == 0:
        return total
    padding = -size % (rows * REDUCTION_LANES)
    blocks = torch.nn.functional.pad(x, (0, padding)).view(*lead, -1, rows, REDUCTION_LANES)
    lanes = torch.zeros_like(blocks[..., 0, :])
    for row in blocks.unbind(-2):
        lanes = lanes + row
    sums = torch.zeros_like(lanes[..., 0])
    for lane in lanes.unbind(-1):
        sums = sums + lane
    for block in sums.unbind(-1):
        total = total + block
    return total


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
