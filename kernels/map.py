"""Map: trim, elect and combine in one sweep; stream, the map that also counts and marks; fix_up."""

import triton
import triton.language as tl

from pymerge.kernels.pieces import (
    COLUMNS,
    MAGNITUDE,
    MARK,
    OUTLIERS,
    RANDOM,
    cut_threshold,
    element_at,
    load_block,
    open_piece,
    raw_pointer,
    store_block,
)
from pymerge.kernels.stages import (
    NOTHING,
    agrees,
    combine_base,
    combine_mean,
    combine_nan,
    elect,
    flip_sign,
    keep_where,
    magnitude,
    narrow,
    trim_magnitude,
    trim_outliers,
    trim_random,
)

# `numbers`, f32: K weights, lambda, the sum of the weights (or 1), K late weights, then for each tensor and
# expert a scale.
LATE_WEIGHTS = tl.constexpr(2)


@triton.jit
def weigh(d, numbers, tensor, k, K: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr):
    """v = (d * scale) * weight, two roundings; UNIT: every weight and scale is 1."""
    if UNIT:
        return d
    elif BASE:
        scale = tl.load(numbers + 2 * K + LATE_WEIGHTS + tensor * K + k)
        return d * scale * tl.load(numbers + k)
    else:
        return d * tl.load(numbers + k)


@triton.jit
def merged(
    base,
    values,
    mass,
    numbers,
    lambda_,
    K: tl.constexpr,
    BASE: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LATE: tl.constexpr,
):
    """The result of one block. `values`: v of each expert, zero where trimmed; `mass`: their sum.

    LATE: what agrees is multiplied by the late weights.
    """
    total = mass
    if ELECT:
        side = elect(mass)
        total, weights = tl.zeros_like(mass), tl.zeros_like(mass)
        for k in tl.static_range(K):
            flipped = flip_sign(values[k], side)
            agreeing = tl.maximum(flipped, 0.0)
            if LATE:
                late = tl.load(numbers + K + LATE_WEIGHTS + k)
                agreeing = tl.where(agrees(flipped), flipped * late, 0.0)
            total += agreeing
            if NORMALIZE:
                weight = 1.0 if UNIT else tl.load(numbers + k)
                weights += tl.where(agrees(flipped), weight, 0.0)
        total = flip_sign(total, side)
        if NORMALIZE:
            total = combine_mean(total, weights)
    elif NORMALIZE:
        total = tl.div_rn(total, tl.zeros_like(total) + tl.load(numbers + K + 1))
    if BASE:
        total = combine_base(base, lambda_, total)
    if ELECT:
        total = combine_nan(total, mass)
    return total


@triton.jit
def map_pieces(
    launched,
    pieces,
    sizes,
    addresses,
    numbers,
    cuts,
    keys,
    limits,
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RAGGED: tl.constexpr,
    BASE: tl.constexpr,
    TRIM: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges one piece by final cuts (TRIM MAGNITUDE, OUTLIERS), or at random (TRIM RANDOM).

    `cuts` (G, K, 2), the thresholds; with OUTLIERS (G, 2K, 2), the outliers' after all of these. RANDOM: by
    `keys` (T, 2) and `limits` (K).
    """
    CUTS: tl.constexpr = 2 * K if TRIM == OUTLIERS else K if TRIM == MAGNITUDE else 0
    number = tl.load(launched + tl.program_id(0))
    tensor, first, count, group, flat = open_piece(pieces, sizes, number)
    out = element_at(addresses, tensor, K + 1, first, K, OUT, RAGGED)
    experts, before, after, stop = (), (), (), ()
    for k in tl.static_range(K):
        experts = experts + (element_at(addresses, tensor, k + 1, first, K, IN, RAGGED),)
    for c in tl.static_range(CUTS):
        index = tl.load(cuts + (group * CUTS + c) * 2 + 1)
        before = before + (cut_threshold(cuts, group, c, index - 1, CUTS),)
        after = after + (cut_threshold(cuts, group, c, index, CUTS),)
        stop = stop + (tl.minimum(tl.maximum(index - flat, 0), 0x7FFFFFFF).to(tl.int32),)
    if BASE:
        base = element_at(addresses, tensor, 0, first, K, IN, RAGGED)
    if TRIM == RANDOM:
        key0 = tl.load(keys + tensor * 2).to(tl.uint32)
        key1 = tl.load(keys + tensor * 2 + 1).to(tl.uint32)
    lambda_ = tl.load(numbers + K)
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        b = tl.zeros((BLOCK,), tl.float32)
        if BASE:
            b = load_block(base, here, count, IN, RAGGED)
        values = ()
        mass = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            d = load_block(experts[k], here, count, IN, RAGGED)
            if BASE:
                d -= b
            v = weigh(d, numbers, tensor, k, K, BASE, UNIT)
            if TRIM == MAGNITUDE:
                v = tl.where(trim_magnitude(d, tl.where(here < stop[k], before[k], after[k])), v, 0.0)
            if TRIM == OUTLIERS:
                reaches = trim_magnitude(d, tl.where(here < stop[k], before[k], after[k]))
                outlier = trim_magnitude(d, tl.where(here < stop[K + k], before[K + k], after[K + k]))
                v = tl.where(trim_outliers(reaches, outlier), v, 0.0)
            if TRIM == RANDOM:
                block = (first + step * BLOCK) // 4 + tl.arange(0, BLOCK // 4)
                keep = trim_random(block, k, key0, key1, tl.load(limits + k)).reshape((BLOCK,))
                v = tl.where(keep, v, 0.0)
            mass += v
            values = values + (v,)
        result = merged(b, values, mass, numbers, lambda_, K, BASE, ELECT, NORMALIZE, UNIT, LATE)
        store_block(out, here, count, narrow(result, OUT), RAGGED)
        step += 1


@triton.jit
def lowered(threshold):
    """A threshold as i32, less by one: its difference to a magnitude is negative where that is kept."""
    # What keeps nothing must not wrap around to what keeps everything.
    return tl.where(threshold == NOTHING, 0x7FFFFFFF, (threshold - 1).to(tl.int32, bitcast=True))


@triton.jit
def count(mask, here, size, RAGGED: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr):
    """How many of each thread's PER elements have a mask of all ones."""
    if RAGGED:
        mask = tl.where(here < size, mask, 0)
    return -tl.sum(mask.reshape((BLOCK // PER, PER)), 1)


@triton.jit
def stream(
    launched,
    pieces,
    sizes,
    addresses,
    numbers,
    low,
    high,
    marks,
    tallies,
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    RAGGED: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LATE: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    PER: tl.constexpr,
):
    """The one pass over a piece: merges as if the undecided were trimmed, counts, and marks the undecided.

    `low`, `high`: the bracket, two cuts that change between pieces only. `marks`: a bit for each element.
    `tallies` (P, 2K + 1) i32: for each expert how many entries `high` keeps; how many lie above the magnitude
    of `high` (ALL); then how many elements are undecided for some expert.
    Thresholds are lowered by one, so that the sign of (threshold - magnitude), spread over all bits, is a
    mask of what is kept: the trim, the count and the mark share it, and it takes fewer registers than
    predicates (sm_90, bf16, K = 8: 96 against 255, for 6 % more instructions). PER: elements of a thread,
    whose sums need no other thread.
    """
    number = tl.load(launched + tl.program_id(0))
    tensor, first, size, group, flat = open_piece(pieces, sizes, number)
    base = element_at(addresses, tensor, 0, first, K, IN, RAGGED)
    out = element_at(addresses, tensor, K + 1, first, K, OUT, RAGGED)
    marks += tl.load(pieces + number.to(tl.int64) * COLUMNS + MARK)
    experts, keep_at, open_at, above_at, kept, above = (), (), (), (), (), ()
    for k in tl.static_range(K):
        experts = experts + (element_at(addresses, tensor, k + 1, first, K, IN, RAGGED),)
        keep_at = keep_at + (lowered(cut_threshold(high, group, k, flat, K)),)
        open_at = open_at + (lowered(cut_threshold(low, group, k, flat, K)),)
        kept = kept + (tl.zeros((BLOCK // PER,), tl.int32),)
        if ALL:
            past = tl.load(high + (group * K + k) * 2 + 1)
            above_at = above_at + (lowered(cut_threshold(high, group, k, past, K)),)
            above = above + (tl.zeros((BLOCK // PER,), tl.int32),)
    opened = tl.zeros((BLOCK // 8,), tl.int32)
    lambda_ = tl.load(numbers + K)
    step = 0
    while step * BLOCK < size:
        here = step * BLOCK + tl.arange(0, BLOCK)
        b = load_block(base, here, size, IN, RAGGED)
        values, now_kept, now_above = (), (), ()
        mass = tl.zeros((BLOCK,), tl.float32)
        undecided = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(K):
            d = load_block(experts[k], here, size, IN, RAGGED) - b
            m = magnitude(d).to(tl.int32, bitcast=True)
            keep = (keep_at[k] - m) >> 31
            undecided |= (open_at[k] - m) & ~keep
            v = keep_where(keep, weigh(d, numbers, tensor, k, K, True, UNIT))
            mass += v
            values = values + (v,)
            now_kept = now_kept + (kept[k] + count(keep, here, size, RAGGED, BLOCK, PER),)
            if ALL:
                over = (above_at[k] - m) >> 31
                now_above = now_above + (above[k] + count(over, here, size, RAGGED, BLOCK, PER),)
        kept, above = now_kept, now_above
        result = merged(b, values, mass, numbers, lambda_, K, True, ELECT, NORMALIZE, UNIT, LATE)
        store_block(out, here, size, narrow(result, OUT), RAGGED)
        if RAGGED:
            undecided = tl.where(here < size, undecided, 0)
        bit = (undecided.to(tl.uint32, bitcast=True) >> 31).reshape((BLOCK // 8, 8))
        tl.store(
            marks + step * (BLOCK // 8) + tl.arange(0, BLOCK // 8),
            tl.sum(bit << tl.arange(0, 8)[None, :].to(tl.uint32), 1).to(tl.uint8),
        )
        opened += tl.sum(bit.to(tl.int32), 1)
        step += 1
    tallies += number.to(tl.int64) * (2 * K + 1)
    for k in tl.static_range(K):
        tl.store(tallies + k, tl.sum(kept[k], 0))
        if ALL:
            tl.store(tallies + K + k, tl.sum(above[k], 0))
    tl.store(tallies + 2 * K, tl.sum(opened, 0))


@triton.jit
def fix_up(
    pieces,
    sizes,
    rows,
    flats,
    owners,
    kinds,
    origins,
    addresses,
    numbers,
    cuts,
    K: tl.constexpr,
    OUT: tl.constexpr,
    KIND: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    LATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the gathered undecided again, by the exact cuts, and puts their results in place.

    `pieces`, `sizes`, `rows`: the gathered, see stats.gather. `addresses`: of the tensors themselves.
    """
    group, first, count, _, row = open_piece(pieces, sizes, tl.program_id(0))
    lambda_ = tl.load(numbers + K)
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        live = here < count
        flat = tl.load(flats + row + here, mask=live, other=0)
        tensor = tl.load(owners + row + here, mask=live, other=0).to(tl.int64)
        b = load_block(element_at(rows, group, 0, first, K, tl.float32, True), here, count, tl.float32, True)
        values = ()
        mass = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            expert = element_at(rows, group, k + 1, first, K, tl.float32, True)
            d = load_block(expert, here, count, tl.float32, True)
            keep = trim_magnitude(d, cut_threshold(cuts, group, k, flat, K))
            v = tl.where(keep, weigh(d, numbers, tensor, k, K, True, UNIT), 0.0)
            mass += v
            values = values + (v,)
        result = merged(b, values, mass, numbers, lambda_, K, True, ELECT, NORMALIZE, UNIT, LATE)
        live = live & (tl.load(kinds + tensor * 2 + 1) == KIND)
        out = raw_pointer(tl.load(addresses + tensor * (K + 2) + K + 1, mask=live, other=0), OUT)
        tl.store(out + (flat - tl.load(origins + tensor)), narrow(result, OUT), mask=live)
        step += 1
