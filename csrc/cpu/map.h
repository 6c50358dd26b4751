// The map kernel: trim, elect and combine in one sweep over the inputs, written once for every lane type.
//
// Per group of kGroup vectors, two short loops over the experts: the first loads each input once, trims, and
// adds up the mass; the second, over values still in the first-level cache, adds up those that agree.
// The loop over experts is outside the loop over vectors, so any number of experts runs at full speed.
#pragma once
#include <algorithm>

#include "../core/combine.h"
#include "../core/elect.h"
#include "../core/lane.h"
#include "../core/params.h"
#include "../core/trim.h"

namespace pm {

// What a kernel is compiled for; everything else is a run-time parameter.
template <bool kBase, Trim kTrim, bool kElect, bool kUnit, Collect kCollect = Collect::no>
struct Shape {
  static constexpr bool base = kBase;  // task vectors against a base, or the inputs themselves
  static constexpr Trim trim = kTrim;
  static constexpr bool elect = kElect;
  static constexpr bool unit = kUnit;  // every weight and scale is 1, late weights too
  static constexpr Collect collect = kCollect;
};

constexpr int kMaxGroup = 64;  // elements of the widest group

// One bit per element from the masks of a group.
template <bool Ordered, class V, class T>
PM_HD uint64_t group_bits(T, const typename V::Mask (&mask)[kGroup]) {
  uint64_t fields = 0;
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g) fields |= uint64_t(V::mask_bits(mask[g])) << (16 * g);
  return element_mask<Ordered>(T{}, V{}, fields);
}

inline size_t map_scratch_bytes(int experts) {
  return size_t(experts) * (kMaxGroup * 8 + 4 * 64 + sizeof(void*)) + size_t(experts + 2) * kMaxGroup * 8 +
         256;
}

template <class V, class T, class S>
class MapKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  using Mask = typename V::Mask;
  using Count = typename V::Count;
  using GroupCount = typename V::GroupCount;
  using Vectors = V[kGroup];
  static constexpr int kElements = V::width * kGroup;
  static constexpr bool kOrdered = S::trim == Trim::given;  // masks are in element order
  static constexpr bool kCollecting = S::collect != Collect::no;
  static constexpr bool kCountsAbove = S::collect == Collect::all;
  static constexpr int kCuts = S::trim == Trim::outliers ? 2 : 1;  // per expert

 public:
  // Returns how many results are NaN, the undecided left out.
  static int64_t run(const MapParams<Work>& p, const MapBlock<Work>& block, void* scratch) {
    MapKernel k(p, block, scratch);
    const Raw* base = static_cast<const Raw*>(block.base);
    const Raw* const* expert = reinterpret_cast<const Raw* const*>(block.expert);
    Raw* out = static_cast<Raw*>(block.out);
    int64_t at = 0;
    for (; at + kElements <= block.count; at += kElements) k.group(base, expert, out + at, at, at, kElements);
    if (at < block.count) k.tail(base, expert, out + at, at, int(block.count - at));
    if constexpr (kCollecting) k.report_counts();
    return k.nan_;
  }

 private:
  MapKernel(const MapParams<Work>& p, const MapBlock<Work>& block, void* scratch) : p_(p), b_(block) {
    auto take = [&scratch](size_t bytes) {
      void* piece = scratch;
      scratch = static_cast<char*>(scratch) + (bytes + 63) / 64 * 64;
      return piece;
    };
    entries_ = static_cast<Vectors*>(take(sizeof(Vectors) * p.experts));
    tail_ = static_cast<Raw*>(take(sizeof(Raw) * kElements * (p.experts + 2)));
    tail_expert_ = static_cast<const Raw**>(take(sizeof(Raw*) * p.experts));
    static_assert(sizeof(Count) <= 64);
    kept_ = static_cast<Count*>(take(sizeof(Count) * kCuts * p.experts));
    above_ = static_cast<Count*>(take(sizeof(Count) * kCuts * p.experts));
    if constexpr (kCollecting) {
      for (int c = 0; c < kCuts * p.experts; ++c) kept_[c] = above_[c] = Count::zero();
    }
  }

  // The last, short group runs on padded copies; equal padding makes zero task vectors, which never count.
  void tail(const Raw* base, const Raw* const* expert, Raw* out, int64_t at, int count) {
    Raw* to = tail_;
    auto pad = [&to, at, count](const Raw* from) {
      std::fill(std::copy(from + at, from + at + count, to), to + kElements, Raw(0));
      to += kElements;
      return to - kElements;
    };
    for (int k = 0; k < p_.experts; ++k) tail_expert_[k] = pad(expert[k]);
    const Raw* padded_base = S::base ? pad(base) : nullptr;
    group(padded_base, tail_expert_, to, 0, at, count);
    std::copy(to, to + count, out);
  }

  // Asks for what comes 512 bytes later: 1.2 times the speed of the hardware prefetcher alone over nine
  // streams (Ice Lake, 2 threads, K = 8, bf16: 0.067 s against 0.080 s for 64 Mi elements; 1,024 and 2,048
  // were slower).
  PM_HD static void prefetch(const Raw* p) {
    constexpr int kAhead = 512, kLine = 64;
    for (int line = 0; line < int(kElements * sizeof(Raw)); line += kLine)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + line);
  }

  // Which entries reach a cut; what its bracket leaves open is added to the undecided.
  PM_HD Mask reach(int64_t cut, int g, V d, Mask* undecided, GroupCount* kept, GroupCount* above) const {
    const Mask reaches = trim_magnitude(d, b_.keep_at[cut]);
    if constexpr (kCollecting) {
      *undecided |= trim_magnitude(d, b_.open_at[cut]) ^ reaches;
      kept->add(g, reaches);
    }
    if constexpr (kCountsAbove) above->add(g, trim_magnitude(d, b_.count_at[cut]));
    return reaches;
  }

  PM_HD void group(const Raw* base, const Raw* const* expert, Raw* out, int64_t at, int64_t offset,
                   int count) {
    V b[kGroup], mass[kGroup];
    Mask undecided[kGroup];
    if constexpr (S::base) load_group<kOrdered>(T{}, base + at, b);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) mass[g] = V::set(0), undecided[g] = V::none();
    for (int64_t k = 0; k < p_.experts; ++k) {
      V d[kGroup];
      Mask given[kGroup];
      load_group<kOrdered>(T{}, expert[k] + at, d);
      prefetch(expert[k] + at);
      if (S::trim == Trim::given && b_.mask[k])
        spread_bits(b_.mask[k][offset / 64] >> (offset % 64), V{}, given);
      GroupCount kept[kCuts], above[kCuts];
#pragma GCC unroll 2
      for (int c = 0; c < kCuts; ++c) {
        if constexpr (kCollecting) kept[c] = GroupCount::begin(kept_ + c * p_.experts + k);
        if constexpr (kCountsAbove) above[c] = GroupCount::begin(above_ + c * p_.experts + k);
      }
      // One vector after the other: side by side they would need more registers than there are.
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        if constexpr (S::base) d[g] = d[g] - b[g];
        Mask keep = V::all();
        if constexpr (by_magnitude(S::trim)) keep = reach(k, g, d[g], undecided + g, kept, above);
        if constexpr (S::trim == Trim::outliers)
          keep = trim_outliers(keep, reach(p_.experts + k, g, d[g], undecided + g, kept + 1, above + 1));
        if constexpr (S::trim == Trim::given)
          if (b_.mask[k]) keep = given[g];
        V v = d[g];
        if constexpr (!S::unit) v = (S::base ? v * V::set(p_.scale[k]) : v) * V::set(p_.weight[k]);
        if constexpr (S::trim != Trim::none) v = keep_where(keep, v);
        mass[g] = mass[g] + v;
        if constexpr (S::elect) entries_[k][g] = v;
      }
#pragma GCC unroll 2
      for (int c = 0; c < kCuts; ++c) {
        if constexpr (kCollecting) kept[c].end();
        if constexpr (kCountsAbove) above[c].end();
      }
    }
    V merged[kGroup], result[kGroup];
    finish(mass, merged);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
      result[g] = combine_result<S::base, S::elect>(b[g], merged[g], mass[g], V::set(p_.lambda));
    const bool bypass_cache = b_.bypass_cache && count == kElements;
    const bool any_nan = store_group<kOrdered>(T{}, out, result, bypass_cache);
    uint64_t open = 0;
    if constexpr (kCollecting) {
      open = group_bits<kOrdered, V>(T{}, undecided);
      b_.undecided[offset / 64] |= open << (offset % 64);
    }
    if (any_nan) [[unlikely]]
      nan_ += count_nan(result, count, open);
    if constexpr (S::base && !kCollecting)
      for (int f = 0; f < b_.furthers; ++f) store_further(b_.further[f], b, merged, mass, offset, count);
  }

  void store_further(Further<Work>& to, const V (&b)[kGroup], const V (&merged)[kGroup],
                     const V (&mass)[kGroup], int64_t offset, int count) const {
    V result[kGroup];
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
      result[g] = combine_result<S::base, S::elect>(b[g], merged[g], mass[g], V::set(to.lambda));
    Raw line[kElements];
    Raw* out = static_cast<Raw*>(to.out) + offset;
    const bool whole = count == kElements;
    const bool any_nan = store_group<kOrdered>(T{}, whole ? out : line, result, whole && to.bypass_cache);
    if (!whole) std::copy(line, line + count, out);
    if (any_nan) [[unlikely]]
      to.nan += count_nan(result, count, 0);
  }

  static int64_t count_nan(const V (&result)[kGroup], int count, uint64_t undecided) {
    Raw line[kElements];
    store_group<kOrdered>(T{}, line, result, false);
    int64_t nan = 0;
    for (int j = 0; j < count; ++j) nan += line[j] == T::nan && !(undecided >> j & 1);
    return nan;
  }

  // The merged task vectors.
  PM_HD void finish(const V (&mass)[kGroup], V (&merged)[kGroup]) {
    V sum[kGroup], weights[kGroup], side[kGroup];
    if constexpr (S::elect) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        side[g] = elect(mass[g]);
        sum[g] = weights[g] = V::set(0);
      }
      for (int64_t k = 0; k < p_.experts; ++k) {
        const V weight = S::unit ? V::set(1) : V::set(p_.weight[k]);
        const Work* late = S::unit ? nullptr : p_.late;
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          const V v = entries_[k][g];
          const Mask agree = agrees(v, side[g]);
          sum[g] = add_where(agree, sum[g], late ? v * V::set(late[k]) : v);
          weights[g] = S::unit ? tally_where(agree, weights[g]) : add_where(agree, weights[g], weight);
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g)
        if constexpr (S::unit) weights[g] = tallied(weights[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
      merged[g] = combine_entries<S::elect>(mass[g], sum[g], weights[g], V::set(p_.divisor), p_.normalize);
  }

  void report_counts() {
    for (int c = 0; c < kCuts * p_.experts; ++c) {
      b_.above[c] += (kCountsAbove ? above_ : kept_)[c].total();
      if (kCountsAbove) b_.kept[c] += kept_[c].total();
    }
  }

  const MapParams<Work>& p_;
  const MapBlock<Work>& b_;
  Vectors* entries_;  // trimmed, weighted task vectors
  Raw* tail_;         // padded copies of a short last group
  const Raw** tail_expert_;
  Count *kept_, *above_;  // per cut
  int64_t nan_ = 0;
};

}  // namespace pm
