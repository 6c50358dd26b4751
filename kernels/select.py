"""Select: the exact cut of each group and expert, by counting digits of keys, then placing ties.

A key is the magnitude, all NaN equal. Keys come from whole inputs, or from rows gathered from them, of which
`flats` holds the flat indices. WITHIN: only keys between two cuts, `low` and `high`, take part.
State by group and expert, i64 (G, K): `prefixes`, the digits known; `ranks`, 1 for the largest, among the
keys that share them. Where a rank is past the last key the answer is void, but nothing breaks.
"""

import triton
import triton.language as tl

from pymerge.kernels.pieces import cut_threshold, open_piece, task_vector
from pymerge.kernels.stages import NAN_KEY, magnitude

# Three digits of 11 bits hold the 31 bits of a magnitude.
DIGITS = tl.constexpr(3)
DIGIT = tl.constexpr(11)
BINS = tl.constexpr(2048)


@triton.jit
def keys_between(
    addresses,
    tensor,
    group,
    k,
    first,
    flat,
    flats,
    here,
    count,
    low,
    high,
    K: tl.constexpr,
    IN: tl.constexpr,
    BASE: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """Keys, and which of them take part in the search."""
    d = task_vector(addresses, tensor, k, first, here, count, K, IN, BASE)
    key = tl.minimum(magnitude(d), NAN_KEY)
    live = here < count
    if WITHIN:
        at = tl.load(flats + flat + here, mask=live, other=0)
        live = live & (key >= cut_threshold(low, group, k, at, K))
        live = live & (key < cut_threshold(high, group, k, at, K))
    return key.to(tl.int32, bitcast=True), live


@triton.jit
def count_digits(
    launched,
    pieces,
    sizes,
    addresses,
    flats,
    low,
    high,
    prefixes,
    tables,
    SHIFT: tl.constexpr,
    K: tl.constexpr,
    IN: tl.constexpr,
    BASE: tl.constexpr,
    WITHIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digit at SHIFT of the keys that share the prefix, into `tables` (G, K, BINS) i64."""
    number, k = tl.load(launched + tl.program_id(0) // K), tl.program_id(0) % K
    tensor, first, count, group, flat = open_piece(pieces, sizes, number)
    prefix = tl.load(prefixes + group * K + k).to(tl.int32)
    table = tl.zeros((BINS,), tl.int32)
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        key, inside = keys_between(
            addresses, tensor, group, k, first, flat, flats, here, count, low, high, K, IN, BASE, WITHIN
        )
        digit = key >> SHIFT
        table += tl.histogram(digit & (BINS - 1), BINS, mask=inside & ((digit >> DIGIT) == prefix))
        step += 1
    to = tables + (group * K + k) * BINS + tl.arange(0, BINS)
    tl.atomic_add(to, table.to(tl.int64), mask=table > 0, sem="relaxed")


@triton.jit
def digit_of(table, rank):
    """The digit that holds the rank, by how many keys have each; and how many keys have a larger one."""
    reaching = tl.cumsum(table, 0, reverse=True)
    digit = tl.maximum(tl.sum((reaching >= rank).to(tl.int32), 0) - 1, 0)
    return digit, tl.sum(tl.where(tl.arange(0, BINS) > digit, table, 0), 0)


@triton.jit
def settle_digit(tables, prefixes, ranks, totals, FIRST: tl.constexpr):
    """Adds the digit found to the prefix, clears the table. FIRST: `totals` gets the number of keys."""
    search = tl.program_id(0)
    row = tables + search * BINS + tl.arange(0, BINS)
    table, rank = tl.load(row), tl.load(ranks + search)
    digit, larger = digit_of(table, rank)
    tl.store(ranks + search, rank - larger)
    tl.store(prefixes + search, (tl.load(prefixes + search) << DIGIT) | digit)
    if FIRST:
        tl.store(totals + search, tl.sum(table, 0))
    tl.store(row, tl.zeros((BINS,), tl.int64))


@triton.jit
def count_equal(
    launched,
    pieces,
    sizes,
    addresses,
    flats,
    low,
    high,
    prefixes,
    tallies,
    K: tl.constexpr,
    IN: tl.constexpr,
    BASE: tl.constexpr,
    WITHIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys of a piece equal the magnitude found: `tallies` (P, K) i64."""
    number, k = tl.load(launched + tl.program_id(0) // K), tl.program_id(0) % K
    tensor, first, count, group, flat = open_piece(pieces, sizes, number)
    found = tl.load(prefixes + group * K + k).to(tl.int32)
    equal = tl.zeros((), tl.int64)
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        key, inside = keys_between(
            addresses, tensor, group, k, first, flat, flats, here, count, low, high, K, IN, BASE, WITHIN
        )
        equal += tl.sum((inside & (key == found)).to(tl.int64), 0)
        step += 1
    tl.store(tallies + number.to(tl.int64) * K + k, equal)


@triton.jit
def place_ties(
    holders,
    ranks,
    pieces,
    sizes,
    addresses,
    kinds,
    flats,
    low,
    high,
    prefixes,
    indices,
    K: tl.constexpr,
    IN: tl.constexpr,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    WITHIN: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the keys that equal the magnitude, the one of each rank lies in piece `holders`: one past its index.

    `holders`, `ranks`, `indices`: (G, K) i64.
    """
    search = tl.program_id(0)
    k = search % K
    tensor, first, count, group, flat = open_piece(pieces, sizes, tl.load(holders + search))
    if tl.load(kinds + tensor * 2) == KIND:
        found, rank = tl.load(prefixes + search).to(tl.int32), tl.load(ranks + search)
        last, seen = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
        step = 0
        while step * BLOCK < count:
            here = step * BLOCK + tl.arange(0, BLOCK)
            key, inside = keys_between(
                addresses, tensor, group, k, first, flat, flats, here, count, low, high, K, IN, BASE, WITHIN
            )
            equal = (inside & (key == found)).to(tl.int64)
            ordinal = seen + tl.cumsum(equal, 0)
            last = tl.maximum(last, tl.max(tl.where((equal != 0) & (ordinal == rank), here, 0), 0))
            seen += tl.sum(equal, 0)
            step += 1
        at = tl.load(flats + flat + last) if LISTED else flat + last
        tl.store(indices + search, at + 1)


@triton.jit
def select_small(
    launched,
    addresses,
    sizes,
    ranks,
    cuts,
    K: tl.constexpr,
    IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cut of one expert of one tensor of at most BLOCK elements, which is its own group."""
    tensor, k = tl.load(launched + tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    size, rank = tl.load(sizes + tensor), tl.load(ranks + tensor * K + k)
    here = tl.arange(0, BLOCK)
    d = task_vector(addresses, tensor, k, 0, here, size, K, IN, True)
    key = tl.minimum(magnitude(d), NAN_KEY).to(tl.int32, bitcast=True)
    found = tl.zeros((), tl.int32)
    for settled in tl.static_range(DIGITS):
        digit = key >> (DIGIT * (DIGITS - 1 - settled))
        inside = (here < size) & ((digit >> DIGIT) == found)
        next_digit, larger = digit_of(tl.histogram(digit & (BINS - 1), BINS, mask=inside), rank)
        found = (found << DIGIT) | next_digit
        rank -= larger
    equal = ((here < size) & (key == found)).to(tl.int32)
    last = tl.max(tl.where((equal != 0) & (tl.cumsum(equal, 0) == rank), here + 1, 0), 0)
    tl.store(cuts + (tensor * K + k) * 2, found.to(tl.int64))
    tl.store(cuts + (tensor * K + k) * 2 + 1, last.to(tl.int64))
