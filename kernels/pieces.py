"""What one program is given: a piece, which is a run of elements of one tensor; and how it reads them.

Tables of int64:
`pieces` (P, 6): tensor, first element, count, group, flat index of the first element in its group, and the
byte at which its undecided are marked. `addresses` (T, K + 2): base, experts, out. `sizes` (T): elements.
`cuts` (G, K, 2): magnitude and index; kept is what lies above the magnitude, or equals it at a lower index.
RAGGED: the piece is no multiple of BLOCK, or its addresses are no multiples of 16.
"""

import triton
import triton.language as tl

from pymerge.kernels.stages import threshold_at, widen

COLUMNS = tl.constexpr(6)
MARK = tl.constexpr(5)
# How entries are trimmed, as pymerge.rule.Trim lists it.
MAGNITUDE, RANDOM, OUTLIERS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def open_piece(pieces, sizes, number):
    """Tensor, first element, how many of its elements exist, group and flat index of a piece."""
    row = pieces + number.to(tl.int64) * COLUMNS
    tensor, first, count = tl.load(row), tl.multiple_of(tl.load(row + 1), 16), tl.load(row + 2)
    group, flat = tl.load(row + 3), tl.load(row + 4)
    return tensor, first, tl.minimum(count, tl.load(sizes + tensor) - first).to(tl.int32), group, flat


@triton.jit
def raw_pointer(address, TYPE: tl.constexpr):
    """Addresses as pointers to the integers that elements of TYPE travel as."""
    if TYPE == tl.float32:
        return address.to(tl.pointer_type(tl.uint32))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def aligned_pointer(address, TYPE: tl.constexpr):
    """The same for one address that is a multiple of 16: a hint on what a call returns would be lost."""
    if TYPE == tl.float32:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), 16)


@triton.jit
def element_at(addresses, tensor, column, first, K: tl.constexpr, TYPE: tl.constexpr, RAGGED: tl.constexpr):
    """A pointer to element `first` of the base (column 0), expert k (k + 1) or the output (K + 1)."""
    address = tl.load(addresses + tensor * (K + 2) + column)
    if RAGGED:
        return raw_pointer(address, TYPE) + first
    else:
        return aligned_pointer(address, TYPE) + first


@triton.jit
def load_block(pointer, here, count, TYPE: tl.constexpr, RAGGED: tl.constexpr):
    """The elements at offsets `here`, as f32; zero past the end of a ragged piece."""
    if RAGGED:
        return widen(tl.load(pointer + here, mask=here < count, other=0), TYPE)
    else:
        return widen(tl.load(pointer + here), TYPE)


@triton.jit
def store_block(pointer, here, count, raw, RAGGED: tl.constexpr):
    if RAGGED:
        tl.store(pointer + here, raw, mask=here < count)
    else:
        tl.store(pointer + here, raw)


@triton.jit
def cut_threshold(cuts, group, k, flat, K: tl.constexpr):
    """The threshold of expert k's cut at flat index `flat`."""
    cut = cuts + (group * K + k) * 2
    return threshold_at(tl.load(cut), tl.load(cut + 1), flat)


@triton.jit
def task_vector(
    addresses, tensor, k, first, here, count, K: tl.constexpr, IN: tl.constexpr, BASE: tl.constexpr
):
    """d of expert k at offsets `here` from `first`, by the masked loads that fit every piece."""
    x = load_block(element_at(addresses, tensor, k + 1, first, K, IN, True), here, count, IN, True)
    if BASE:
        x -= load_block(element_at(addresses, tensor, 0, first, K, IN, True), here, count, IN, True)
    return x
