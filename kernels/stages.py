"""The formulas on blocks: the twins, name by name, of csrc/core/{dtype,trim,philox,elect,combine}.h.

Elements travel as raw integers (`raw_type`) and are computed in f32. The conversions of bf16 are integer
arithmetic, since triton's interpreter truncates where hardware rounds. Every launch needs
enable_fp_fusion=False: a fused rounding would change bits.
"""

import triton
import triton.language as tl

SIGN_CLEARED = tl.constexpr(0x7FFFFFFF)
# As magnitudes all NaN are equal, above infinity.
NAN_KEY = tl.constexpr(0x7F800001)
NOTHING = tl.constexpr(0xFFFFFFFF)


# -- dtype --------------------------------------------------------------------------------------------------


@triton.jit
def widen(raw, TYPE: tl.constexpr):
    """Raw elements of TYPE as f32, exactly."""
    if TYPE == tl.bfloat16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == tl.float16:
        return raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return raw.to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """f32 as raw elements of TYPE, to nearest even; every NaN becomes the one canonical NaN of the type."""
    bits = x.to(tl.uint32, bitcast=True)
    if TYPE == tl.bfloat16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    elif TYPE == tl.float16:
        return tl.where(x != x, 0x7E00, x.to(tl.float16).to(tl.uint16, bitcast=True)).to(tl.uint16)
    else:
        return tl.where(x != x, 0x7FC00000, bits).to(tl.uint32)


# -- trim ---------------------------------------------------------------------------------------------------


@triton.jit
def magnitude(d):
    """bits(|d|): unsigned integers that order like |d|, NaN above infinity."""
    return d.to(tl.uint32, bitcast=True) & SIGN_CLEARED


@triton.jit
def threshold_at(cut_magnitude, cut_index, flat):
    """The magnitude from which a cut keeps at flat index `flat` (all int64); nothing is above NaN."""
    threshold = cut_magnitude + (flat >= cut_index).to(tl.int64)
    return tl.where(threshold > NAN_KEY, NOTHING, threshold).to(tl.uint32)


@triton.jit
def trim_magnitude(d, threshold):
    """Which entries of a task vector reach the threshold."""
    return magnitude(d) >= threshold


@triton.jit
def trim_outliers(reaches, outlier):
    """Of what reaches the threshold the outliers are dropped; each of them reaches it."""
    return reaches ^ outlier


@triton.jit
def keep_where(mask, x):
    """x where the mask is all ones (int32), +0 where it is zero."""
    return (x.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def multiply_wide(a, m):
    """High and low half of the 64-bit product of u32."""
    product = a.to(tl.uint64) * m
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 on blocks of counters (uint32)."""
    for _ in tl.static_range(10):
        high0, low0 = multiply_wide(c0, 0xD2511F53)
        high1, low1 = multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def trim_random(block, expert, key0, key1, limit):
    """Which elements 4 * block + 0..3 are kept: shape (block..., 4), of a tensor with this key.

    An element is kept where its word is below `limit` (int64: up to 2^32).
    """
    zero = tl.zeros_like(block).to(tl.uint32)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(low, high, (zero + expert).to(tl.uint32), zero, key0, key1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return words.to(tl.int64) < limit


# -- elect --------------------------------------------------------------------------------------------------


@triton.jit
def elect(mass):
    """The sign bit of the summed mass; a sum that starts at +0 is never -0, so zero mass elects plus."""
    return mass.to(tl.uint32, bitcast=True) & 0x80000000


@triton.jit
def flip_sign(x, side):
    return (x.to(tl.uint32, bitcast=True) ^ side).to(tl.float32, bitcast=True)


@triton.jit
def agrees(flipped):
    """An entry, flipped to the elected side, agrees if it is positive: zero bears no sign."""
    return flipped > 0


# -- combine ------------------------------------------------------------------------------------------------


@triton.jit
def combine_mean(total, weights):
    """IEEE division: triton's `/` may be two units off."""
    return tl.div_rn(total, tl.where(weights == 0, 1.0, weights))


@triton.jit
def combine_base(base, lambda_, merged):
    return base + lambda_ * merged


@triton.jit
def combine_nan(result, mass):
    """A kept NaN (or opposite infinities) makes the mass NaN, and then the result is NaN."""
    return tl.where(mass != mass, mass, result)
