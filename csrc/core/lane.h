// The width-1 lane: what one CUDA thread, or a processor without vectors, computes with.
//
// A lane type V offers: V::Work, V::Bits, V::Mask (with ^ and |=), V::width, V::set(x), V::none(),
// V::all(), V::mask_bits(m), V::Count, V::GroupCount, + - * /, magnitude, at_least, sign_bit, flip_sign,
// is_positive, is_zero, is_nan, larger, select, add_where, keep_where, tally_where, tallied; for whole groups
// of kGroup vectors: load_group, store_group, widen_group, element_mask, random_keys, random_words,
// words_below, spread_bits, pack_group. The formulas of trim.h, elect.h, combine.h and fuse.h are written
// over any such type.
#pragma once
#include "philox.h"

namespace pm {

constexpr int kGroup = 4;  // vectors handled together: enough independent work to hide latencies

template <class WorkType>
struct Scalar {
  using Work = WorkType;
  using Bits = typename WorkTraits<Work>::Bits;
  using Mask = bool;
  static constexpr int width = 1;
  Work x;

  PM_HD static Scalar set(Work value) { return {value}; }
  PM_HD static Mask none() { return false; }
  PM_HD static Mask all() { return true; }
  PM_HD static uint32_t mask_bits(bool mask) { return mask; }

  // Counts set masks over a block of elements.
  struct Count {
    int64_t sum;
    PM_HD static Count zero() { return {0}; }
    PM_HD int64_t total() const { return sum; }
  };
  struct GroupCount {
    Count* to;
    PM_HD static GroupCount begin(Count* count) { return {count}; }
    PM_HD void add(int /*g*/, bool mask) { to->sum += mask; }
    PM_HD void end() {}
  };
};

template <class W>
PM_HD Scalar<W> operator+(Scalar<W> a, Scalar<W> b) {
  return {a.x + b.x};
}
template <class W>
PM_HD Scalar<W> operator-(Scalar<W> a, Scalar<W> b) {
  return {a.x - b.x};
}
template <class W>
PM_HD Scalar<W> operator*(Scalar<W> a, Scalar<W> b) {
  return {a.x * b.x};
}
template <class W>
PM_HD Scalar<W> operator/(Scalar<W> a, Scalar<W> b) {
  return {a.x / b.x};
}

template <class W>
PM_HD typename WorkTraits<W>::Bits magnitude(Scalar<W> a) {
  return bit_cast<typename WorkTraits<W>::Bits>(a.x) & ~WorkTraits<W>::sign;
}
PM_HD bool at_least(uint32_t bits, uint32_t threshold) { return bits >= threshold; }
PM_HD bool at_least(uint64_t bits, uint64_t threshold) { return bits >= threshold; }

template <class W>
PM_HD Scalar<W> sign_bit(Scalar<W> a) {
  using Bits = typename WorkTraits<W>::Bits;
  return {bit_cast<W>(Bits(bit_cast<Bits>(a.x) & WorkTraits<W>::sign))};
}
template <class W>
PM_HD Scalar<W> flip_sign(Scalar<W> a, Scalar<W> sign) {
  using Bits = typename WorkTraits<W>::Bits;
  return {bit_cast<W>(Bits(bit_cast<Bits>(a.x) ^ bit_cast<Bits>(sign.x)))};
}
template <class W>
PM_HD bool is_positive(Scalar<W> a) {
  return a.x > 0;
}
template <class W>
PM_HD bool is_zero(Scalar<W> a) {
  return a.x == 0;
}
template <class W>
PM_HD bool is_nan(Scalar<W> a) {
  return a.x != a.x;
}
// Whether |a| > |b|; a NaN is larger than any number.
template <class W>
PM_HD bool larger(Scalar<W> a, Scalar<W> b) {
  return magnitude(a) > magnitude(b);
}
template <class W>
PM_HD Scalar<W> select(bool mask, Scalar<W> yes, Scalar<W> no) {
  return mask ? yes : no;
}
template <class W>
PM_HD Scalar<W> keep_where(bool mask, Scalar<W> a) {
  return {mask ? a.x : W(0)};
}
template <class W>
PM_HD Scalar<W> add_where(bool mask, Scalar<W> sum, Scalar<W> a) {
  return mask ? sum + a : sum;
}

// Counting in whatever form the lanes add fastest; `tallied` makes it a number, exact up to 2^24.
template <class W>
PM_HD Scalar<W> tally_where(bool mask, Scalar<W> tally) {
  return {tally.x + W(mask)};
}
template <class W>
PM_HD Scalar<W> tallied(Scalar<W> tally) {
  return tally;
}

// Groups. `Ordered` loads keep lane order equal to element order; others may permute within a group.
template <bool Ordered, class T, class W>
PM_HD void load_group(T, const typename T::Raw* p, Scalar<W> (&v)[kGroup]) {
  for (int g = 0; g < kGroup; ++g) v[g] = {W(widen(T{}, p[g]))};
}
template <bool Ordered, class T, class W>
PM_HD bool store_group(T, typename T::Raw* p, const Scalar<W> (&v)[kGroup], bool /*bypass_cache*/) {
  bool nan = false;
  for (int g = 0; g < kGroup; ++g) {
    p[g] = narrow(T{}, v[g].x);
    nan |= is_nan(v[g]);
  }
  return nan;
}

// The elements of a group as doubles, in vectors of as many as a register holds.
template <class W, class Doubles, int kParts>
PM_HD void widen_group(const Scalar<W> (&v)[kGroup], Doubles (&to)[kParts]) {
  for (int g = 0; g < kGroup; ++g) to[g / (kGroup / kParts)][g % (kGroup / kParts)] = double(v[g].x);
}

// Masks of a group travel as kGroup 16-bit fields; `element_mask` turns them into one bit per element.
template <bool Ordered, class T, class W>
PM_HD uint64_t element_mask(T, Scalar<W>, uint64_t fields) {
  uint64_t bits = 0;
  for (int g = 0; g < kGroup; ++g) bits |= (fields >> (15 * g)) & (1ull << g);
  return bits;
}

// The random words of the group whose first element has flat index `index` (a multiple of 4), in element
// order; `key` as random_keys made it.
template <class W>
PM_HD uint64_t random_keys(uint64_t key, Scalar<W>) {
  return key;
}
template <class W>
PM_HD void random_words(uint64_t index, uint32_t expert, uint64_t key, Scalar<W>, uint32_t* to) {
  uint32_t c[4] = {uint32_t(index >> 2), uint32_t(index >> 34), expert, 0};
  philox(c, uint32_t(key), uint32_t(key >> 32));
  for (int g = 0; g < kGroup; ++g) to[g] = c[g];
}

// One bit for each word of a group that is below `limit`.
template <class W>
PM_HD uint64_t words_below(const uint32_t* words, uint32_t limit, Scalar<W>) {
  uint64_t bits = 0;
  for (int g = 0; g < kGroup; ++g) bits |= uint64_t(words[g] < limit) << g;
  return bits;
}

// The masks of a group from one bit per element; lanes are in element order.
template <class W>
PM_HD void spread_bits(uint64_t bits, Scalar<W>, bool (&mask)[kGroup]) {
  for (int g = 0; g < kGroup; ++g) mask[g] = bits >> g & 1;
}

// Copies the elements whose bit is set to `to`, packed; may write up to a group past them.
template <class Raw, class W>
PM_HD void pack_group(Scalar<W>, const Raw* from, uint64_t bits, Raw* to) {
  for (int g = 0; g < kGroup; ++g) {
    if (bits >> g & 1) *to++ = from[g];
  }
}

}  // namespace pm
