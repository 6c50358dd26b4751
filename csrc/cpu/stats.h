// Statistics of one expert's task vector, over the same lanes as the map kernel: keys, masses, open keys.
#pragma once
#include "gram.h"

namespace pm {

// A reduction's running state for one expert and one block: all magnitudes, and those kept.
struct Masses {
  double all[kVirtualLanes], kept[kVirtualLanes];
};

// Where the keys of undecided entries go; positions count from `origin`.
template <class Bits>
struct OpenKeys {
  Bits* key;
  uint32_t* position;
  int64_t size;
  uint32_t origin;
};

// The lowest `n` bits, of a group or less.
PM_HD uint64_t first_bits(uint64_t bits, int n) { return n < 64 ? bits & ((1ull << n) - 1) : bits; }

// One sum's virtual lanes, in registers while a kernel runs: in memory every addition would wait for the one
// before to be stored.
template <class V>
class LaneSums {
  using Part = typename Doubles<kPart<V>>::Value;
  static constexpr int kElements = V::width * kGroup, kPart = pm::kPart<V>, kParts = kVirtualLanes / kPart;

 public:
  // The first element belongs to lane `offset` % kVirtualLanes.
  PM_HD LaneSums(const double* lanes, int64_t offset) {
    double line[kVirtualLanes];
    for (int j = 0; j < kVirtualLanes; ++j) line[j] = lanes[(offset + j) % kVirtualLanes];
    for (int p = 0; p < kParts; ++p) sum_[p] = load_doubles<kPart>(line + p * kPart);
  }
  PM_HD void store(double* lanes, int64_t offset) const {
    double line[kVirtualLanes];
    for (int p = 0; p < kParts; ++p) store_doubles<kPart>(sum_[p], line + p * kPart);
    for (int j = 0; j < kVirtualLanes; ++j) lanes[(offset + j) % kVirtualLanes] = line[j];
  }

  // Adds `count` numbers.
  PM_HD void add(const double* x, int64_t count) {
    int64_t j = 0;
    for (; j + kVirtualLanes <= count; j += kVirtualLanes)
      for (int p = 0; p < kParts; ++p) sum_[p] += load_doubles<kPart>(x + j + p * kPart);
    for (int lane = 0; j < count; ++j, ++lane) sum_[lane / kPart][lane % kPart] += x[j];
  }
  // Adds a group whose first element is number `at`; zeros change nothing.
  PM_HD void add(const V (&v)[kGroup], int64_t at) { add_parts<false>(v, at); }
  PM_HD void add_squares(const V (&v)[kGroup], int64_t at) { add_parts<true>(v, at); }

 private:
  template <bool kSquare>
  PM_HD void add_parts(const V (&v)[kGroup], int64_t at) {
    Part wide[kElements / kPart];
    widen_group(v, wide);
    const int lane = kElements % kVirtualLanes ? int(at % kVirtualLanes) : 0;
#pragma GCC unroll 8
    for (int p = 0; p < kElements / kPart; ++p)
      sum_[(lane / kPart + p) % kParts] += kSquare ? wide[p] * wide[p] : wide[p];
  }

  Part sum_[kParts];
};

template <class V, class T>
class StatsKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  using Bits = typename WorkTraits<Work>::Bits;
  static constexpr int kElements = V::width * kGroup;

 public:
  // body(task vectors of a group, its first element, how many of its elements are there).
  template <class F>
  PM_HD static void each_group(const void* base, const void* expert, int64_t count, F&& body) {
    const Raw *b = static_cast<const Raw*>(base), *x = static_cast<const Raw*>(expert);
    for (int64_t at = 0; at < count; at += kElements) {
      const int n = int(std::min<int64_t>(kElements, count - at));
      Raw padded_base[kElements] = {}, padded[kElements] = {};
      const bool whole = n == kElements;
      if (!whole) {
        std::copy(b + at, b + at + n, padded_base);
        std::copy(x + at, x + at + n, padded);
      }
      V vb[kGroup], d[kGroup];
      load_group<true>(T{}, whole ? b + at : padded_base, vb);
      load_group<true>(T{}, whole ? x + at : padded, d);
      for (int g = 0; g < kGroup; ++g) d[g] = d[g] - vb[g];
      body(d, at, n);
    }
  }

  // key[i] = bits(|expert[i] - base[i]|) in element order.
  static void keys(const void* base, const void* expert, int64_t count, Bits* key) {
    each_group(base, expert, count,
               [&](const V(&d)[kGroup], int64_t at, int n) { store_keys(d, n, key + at); });
  }

  // Appends key and position of every entry in [low, high); room for a group more is needed. Returns how many
  // reach `high`.
  static int64_t open_keys(const void* base, const void* expert, int64_t count, Bits low, Bits high,
                           OpenKeys<Bits>* to) {
    int64_t above = 0;
    each_group(base, expert, count, [&](const V(&d)[kGroup], int64_t at, int n) {
      const uint64_t reach = reach_bits(d, n, high), open = reach_bits(d, n, low) & ~reach;
      above += __builtin_popcountll(reach);
      if (!open) return;
      Bits bits[kElements];
      uint32_t position[kElements];
      group_keys(d, bits);
      for (int j = 0; j < kElements; ++j) position[j] = to->origin + uint32_t(at + j);
      pack_group(V{}, bits, open, to->key + to->size);
      pack_group(V{}, position, open, to->position + to->size);
      to->size += __builtin_popcountll(open);
    });
    return above;
  }

  // How many entries lie in [low, high).
  static int64_t count_open(const void* base, const void* expert, int64_t count, Bits low, Bits high) {
    int64_t open = 0;
    each_group(base, expert, count, [&](const V(&d)[kGroup], int64_t, int n) {
      open += __builtin_popcountll(reach_bits(d, n, low) & ~reach_bits(d, n, high));
    });
    return open;
  }

  // Of the first expert: counts what reaches each cut and marks what some bracket leaves open, as map kernels
  // do that collect; writes nothing. `scratch`: map_scratch_bytes(cuts).
  static int64_t search(const MapParams<Work>&, const MapBlock<Work>& b, void* scratch) {
    using Count = typename V::Count;
    using GroupCount = typename V::GroupCount;
    auto *kept = static_cast<Count*>(scratch), *above = kept + b.cuts;
    for (int c = 0; c < 2 * b.cuts; ++c) kept[c] = Count::zero();
    each_group(b.base, b.expert[0], b.count, [&](const V(&d)[kGroup], int64_t at, int n) {
      typename V::Mask undecided[kGroup];
      for (int g = 0; g < kGroup; ++g) undecided[g] = V::none();
      for (int c = 0; c < b.cuts; ++c) {
        GroupCount reached = GroupCount::begin(kept + c);
        for (int g = 0; g < kGroup; ++g) {
          const typename V::Mask reaches = trim_magnitude(d[g], b.keep_at[c]);
          undecided[g] |= trim_magnitude(d[g], b.open_at[c]) ^ reaches;
          reached.add(g, reaches);
        }
        reached.end();
        if (!b.count_at) continue;
        GroupCount higher = GroupCount::begin(above + c);
        for (int g = 0; g < kGroup; ++g) higher.add(g, trim_magnitude(d[g], b.count_at[c]));
        higher.end();
      }
      b.undecided[at / 64] |= first_bits(group_bits<true, V>(T{}, undecided), n) << (at % 64);
    });
    for (int c = 0; c < b.cuts; ++c) {
      b.above[c] += (b.count_at ? above : kept)[c].total();
      if (b.count_at) b.kept[c] += kept[c].total();
    }
    return 0;
  }

  // Adds |d| and the kept |d| of expert k to the virtual lanes; `offset` is the place within the block.
  static void masses(const MapParams<Work>& p, const MapBlock<Work>& b, int k, int64_t offset, Masses* sums) {
    LaneSums<V> all(sums->all, offset), kept(sums->kept, offset);
    each_group(b.base, b.expert[k], b.count, [&](const V(&d)[kGroup], int64_t at, int) {
      typename V::Mask keep[kGroup];
      if (b.mask)
        mask_group(b.mask[k], at, keep);
      else
        for (int g = 0; g < kGroup; ++g) {
          keep[g] = trim_magnitude(d[g], b.keep_at[k]);
          if (b.cuts > p.experts)
            keep[g] = trim_outliers(keep[g], trim_magnitude(d[g], b.keep_at[p.experts + k]));
        }
      V size[kGroup], kept_size[kGroup];
      for (int g = 0; g < kGroup; ++g) {
        size[g] = flip_sign(d[g], sign_bit(d[g]));
        kept_size[g] = keep_where(keep[g], size[g]);
      }
      all.add(size, at);
      kept.add(kept_size, at);
    });
    all.store(sums->all, offset);
    kept.store(sums->kept, offset);
  }

  // Adds the squares of the kept entries of expert k to the virtual lanes.
  static void energies(const MapBlock<Work>& b, int k, int64_t offset, double* lanes) {
    LaneSums<V> sum(lanes, offset);
    each_group(b.base, b.expert[k], b.count, [&](const V(&d)[kGroup], int64_t at, int) {
      typename V::Mask keep[kGroup];
      mask_group(b.mask ? b.mask[k] : nullptr, at, keep);
      V kept[kGroup];
      for (int g = 0; g < kGroup; ++g) kept[g] = keep_where(keep[g], d[g]);
      sum.add_squares(kept, at);
    });
    sum.store(lanes, offset);
  }

  PM_HD static void group_keys(const V (&d)[kGroup], Bits (&bits)[kElements]) {
    memcpy(bits, d, sizeof bits);
    for (int j = 0; j < kElements; ++j)
      bits[j] = std::min<Bits>(bits[j] & ~WorkTraits<Work>::sign, WorkTraits<Work>::nan_key);
  }
  // The keys of the first `n` of a group.
  PM_HD static void store_keys(const V (&v)[kGroup], int n, Bits* to) {
    Bits bits[kElements];
    group_keys(v, bits);
    if (n == kElements)
      memcpy(to, bits, sizeof bits);
    else
      std::copy(bits, bits + n, to);
  }

 private:
  PM_HD static void mask_group(const uint64_t* mask, int64_t at, typename V::Mask (&keep)[kGroup]) {
    if (mask)
      spread_bits(mask[at / 64] >> (at % 64), V{}, keep);
    else
      for (int g = 0; g < kGroup; ++g) keep[g] = V::all();
  }

  // The first `n` entries of a group that reach `threshold`, as bits.
  PM_HD static uint64_t reach_bits(const V (&d)[kGroup], int n, Bits threshold) {
    typename V::Mask reach[kGroup];
    for (int g = 0; g < kGroup; ++g) reach[g] = trim_magnitude(d[g], threshold);
    return first_bits(group_bits<true, V>(T{}, reach), n);
  }
};

}  // namespace pm
