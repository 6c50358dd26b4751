"""Statistics of task vectors: rows gathered from anywhere, how a sample spreads, the masses for rescale."""

import triton
import triton.language as tl

from pymerge.kernels.pieces import (
    COLUMNS,
    MARK,
    OUTLIERS,
    RANDOM,
    cut_threshold,
    element_at,
    load_block,
    open_piece,
    raw_pointer,
    task_vector,
)
from pymerge.kernels.stages import magnitude, trim_magnitude, trim_outliers, trim_random, widen

# The contract's order of sums: element i of a block adds to lane i % 16.
LANES = tl.constexpr(16)
# Elements that a sample reads together: a sector of 32 bytes, or two.
CLUSTER = tl.constexpr(16)


@triton.jit
def list_undecided(pieces, sizes, marks, starts, ends, flats, owners, BLOCK: tl.constexpr):
    """Lists the marked elements of a piece in order: flat index and tensor, from row `starts` (P) on.

    What lies past `ends` (G) is left out; the host knows from the counts that it overflowed.
    """
    number = tl.program_id(0)
    tensor, _, count, group, flat = open_piece(pieces, sizes, number)
    marks += tl.load(pieces + number.to(tl.int64) * COLUMNS + MARK)
    row, end = tl.load(starts + number), tl.load(ends + group)
    step = 0
    while step * BLOCK < count:
        byte = tl.load(marks + step * (BLOCK // 8) + tl.arange(0, BLOCK // 8)).to(tl.int32)
        bit = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1).reshape((BLOCK,))
        to = row + tl.cumsum(bit, 0) - 1
        live = (bit != 0) & (to < end)
        tl.store(flats + to, flat + step * BLOCK + tl.arange(0, BLOCK), mask=live)
        tl.store(owners + to, tl.zeros((BLOCK,), tl.int32) + tensor.to(tl.int32), mask=live)
        row += tl.sum(bit, 0)
        step += 1


@triton.jit
def gather(
    pieces,
    sizes,
    rows,
    flats,
    owners,
    kinds,
    origins,
    addresses,
    K: tl.constexpr,
    IN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the base and every task vector at listed places into f32 rows, where later steps find them.

    `pieces`, `sizes`, `rows`: the rows as tensors, one for each group; `rows` (G, K + 2) are their addresses.
    `flats`, `owners`: flat index and tensor of every row. `kinds` (T, 2): a number for the element type of
    each tensor and of its output; tensors of a kind other than KIND are left to another launch.
    """
    group, first, count, _, row = open_piece(pieces, sizes, tl.program_id(0))
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        live = here < count
        tensor = tl.load(owners + row + here, mask=live, other=0).to(tl.int64)
        element = tl.load(flats + row + here, mask=live, other=0) - tl.load(origins + tensor)
        live = live & (tl.load(kinds + tensor * 2) == KIND)
        base = raw_pointer(tl.load(addresses + tensor * (K + 2), mask=live, other=0), IN)
        b = widen(tl.load(base + element, mask=live, other=0), IN)
        to = element_at(rows, group, 0, first, K, tl.float32, True)
        tl.store(to + here, b.to(tl.uint32, bitcast=True), mask=live)
        for k in tl.static_range(K):
            x = raw_pointer(tl.load(addresses + tensor * (K + 2) + k + 1, mask=live, other=0), IN)
            d = widen(tl.load(x + element, mask=live, other=0), IN) - b
            to = element_at(rows, group, k + 1, first, K, tl.float32, True)
            tl.store(to + here, d.to(tl.uint32, bitcast=True), mask=live)
        step += 1


@triton.jit
def spread(pieces, sizes, rows, flats, cuts, variances, K: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the squared differences, between neighbouring clusters, of how many entries a cut keeps.

    Elements near each other are alike, and so are strata: `variances` (G, K) i64 is what clusters differ by.
    """
    number, k = tl.program_id(0) // K, tl.program_id(0) % K
    group, first, count, _, row = open_piece(pieces, sizes, number)
    expert = element_at(rows, group, k + 1, first, K, tl.float32, True)
    total = tl.zeros((), tl.int64)
    step = 0
    while step * BLOCK < count:
        here = step * BLOCK + tl.arange(0, BLOCK)
        d = load_block(expert, here, count, tl.float32, True)
        flat = tl.load(flats + row + here, mask=here < count, other=0)
        keep = trim_magnitude(d, cut_threshold(cuts, group, k, flat, K)) & (here < count)
        sides = tl.sum(keep.to(tl.int32).reshape((BLOCK // (2 * CLUSTER), 2, CLUSTER)), 2)
        apart = tl.sum(sides * tl.where(tl.arange(0, 2) == 0, 1, -1)[None, :], 1)
        total += tl.sum((apart * apart).to(tl.int64), 0)
        step += 1
    tl.atomic_add(variances + group * K + k, total, sem="relaxed")


@triton.jit
def masses(
    blocks,
    addresses,
    sizes,
    places,
    cuts,
    keys,
    limits,
    sums,
    K: tl.constexpr,
    IN: tl.constexpr,
    TRIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of |d| and of the kept |d|, in f64 and the contract's order, of WIDE blocks of ROWS * 16 elements.

    `blocks` (programs, 2): tensor and its first block. `places` (T, 3): group, flat index of the tensor's
    first element, row of its first block in `sums` (rows, K, 2, 16) f64, which holds each lane.
    """
    CUTS: tl.constexpr = 2 * K if TRIM == OUTLIERS else K
    program, k = tl.program_id(0) // K, tl.program_id(0) % K
    tensor, block = tl.load(blocks + program * 2), tl.load(blocks + program * 2 + 1)
    size = tl.load(sizes + tensor)
    group, flat = tl.load(places + tensor * 3), tl.load(places + tensor * 3 + 1)
    every = block + tl.arange(0, WIDE)
    lane = tl.arange(0, LANES)
    total = tl.zeros((WIDE, LANES), tl.float64)
    kept = tl.zeros((WIDE, LANES), tl.float64)
    rows = tl.minimum((size - block * (LANES * ROWS) + LANES - 1) // LANES, ROWS)
    if TRIM == RANDOM:
        key0 = tl.load(keys + tensor * 2).to(tl.uint32)
        key1 = tl.load(keys + tensor * 2 + 1).to(tl.uint32)
        limit = tl.load(limits + k)
    row = tl.zeros((), tl.int64)
    while row < rows:
        start = every * (LANES * ROWS) + row * LANES
        here = start[:, None] + lane[None, :]
        d = task_vector(addresses, tensor, k, 0, here, size, K, IN, True)
        if TRIM == RANDOM:
            counter = start[:, None] // 4 + tl.arange(0, LANES // 4)[None, :]
            keep = trim_random(counter, k, key0, key1, limit).reshape((WIDE, LANES))
        else:
            keep = trim_magnitude(d, cut_threshold(cuts, group, k, flat + here, CUTS))
            if TRIM == OUTLIERS:
                outlier = trim_magnitude(d, cut_threshold(cuts, group, K + k, flat + here, CUTS))
                keep = trim_outliers(keep, outlier)
        m = magnitude(d).to(tl.float32, bitcast=True).to(tl.float64)
        total += m
        kept += tl.where(keep, m, 0.0)
        row += 1
    to = sums + (((tl.load(places + tensor * 3 + 2) + every)[:, None] * K + k) * 2) * LANES + lane[None, :]
    live = (every * (LANES * ROWS) < size)[:, None]
    tl.store(to, total, mask=live)
    tl.store(to + LANES, kept, mask=live)


@triton.jit
def add_up(sums, begins, results, K: tl.constexpr):
    """Adds lanes in order 0..15, then blocks in index order: one of `results` (T, K, 2) f64."""
    tensor, rest = tl.program_id(0) // (2 * K), tl.program_id(0) % (2 * K)
    total = tl.zeros((), tl.float64)
    block, end = tl.load(begins + tensor), tl.load(begins + tensor + 1)
    while block < end:
        here = tl.zeros((), tl.float64)
        for lane in tl.static_range(16):
            here += tl.load(sums + (block * 2 * K + rest) * LANES + lane)
        total += here
        block += 1
    tl.store(results + tensor * 2 * K + rest, total)
