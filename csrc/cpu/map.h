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
  static constexpr bool unit = kUnit;  // every weight and scale is 1
  static constexpr Collect collect = kCollect;
};

constexpr int kMaxGroup = 64;  // elements of the widest group

inline size_t map_scratch_bytes(int experts) {
  return size_t(experts) * (kMaxGroup * 8 + 3 * 8 + sizeof(void*)) + size_t(experts + 2) * kMaxGroup * 8 +
         256;
}

template <class V, class T, class S>
class MapKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  using Mask = typename V::Mask;
  static constexpr int kElements = V::width * kGroup;
  static constexpr bool kOrdered = S::trim == Trim::random;  // random words come in element order
  static constexpr bool kCollecting = S::collect != Collect::no;

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
    return k.nan_;
  }

 private:
  MapKernel(const MapParams<Work>& p, const MapBlock<Work>& block, void* scratch) : p_(p), b_(block) {
    auto take = [&scratch](size_t bytes) {
      void* piece = scratch;
      scratch = static_cast<char*>(scratch) + (bytes + 63) / 64 * 64;
      return piece;
    };
    entries_ = static_cast<V*>(take(sizeof(V) * kGroup * p.experts));
    tail_ = static_cast<Raw*>(take(sizeof(Raw) * kElements * (p.experts + 2)));
    tail_expert_ = static_cast<const Raw**>(take(sizeof(Raw*) * p.experts));
    fields_ = static_cast<uint16_t*>(take(sizeof(uint16_t) * 3 * kGroup * p.experts));
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

  PM_HD void trim_group(int k, uint64_t index, const V (&d)[kGroup], Mask (&keep)[kGroup]) {
    if constexpr (S::trim == Trim::magnitude) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) keep[g] = trim_magnitude(d[g], b_.keep_at[k]);
    } else if (S::trim == Trim::random && !p_.whole[k]) {
      random_group(index, k, p_.key0, p_.key1, p_.limit[k], V{}, keep);
    } else {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) keep[g] = at_least(magnitude(d[g]), typename V::Bits(0));
    }
  }

  // Mask fields go through memory: storing them costs the vector ports nothing, and they are read much later.
  PM_HD void note_fields(int k, const V (&d)[kGroup], const Mask (&keep)[kGroup]) {
    uint16_t* field = fields_ + 3 * kGroup * k;
    Mask open[kGroup], counted[kGroup];
    V::store_masks(field, keep);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) open[g] = trim_magnitude(d[g], b_.open_at[k]);
    V::store_masks(field + kGroup, open);
    if constexpr (S::collect == Collect::all) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) counted[g] = trim_magnitude(d[g], b_.count_at[k]);
      V::store_masks(field + 2 * kGroup, counted);
    }
  }

  PM_HD void group(const Raw* base, const Raw* const* expert, Raw* out, int64_t at, int64_t offset,
                   int count) {
    V b[kGroup], mass[kGroup];
    if constexpr (S::base) load_group<kOrdered>(T{}, base + at, b);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) mass[g] = V::set(0);
    for (int k = 0; k < p_.experts; ++k) {
      V d[kGroup];
      Mask keep[kGroup];
      load_group<kOrdered>(T{}, expert[k] + at, d);
      prefetch(expert[k] + at);
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g)
        if constexpr (S::base) d[g] = d[g] - b[g];
      trim_group(k, b_.index + offset, d, keep);
      if constexpr (kCollecting) note_fields(k, d, keep);
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        V v = d[g];
        if constexpr (!S::unit) v = (S::base ? v * V::set(p_.scale[k]) : v) * V::set(p_.weight[k]);
        if constexpr (S::trim != Trim::none) v = keep_where(keep[g], v);
        mass[g] = mass[g] + v;
        if constexpr (S::elect) entries_[k * kGroup + g] = v;
      }
    }
    V result[kGroup];
    finish(b, mass, result);
    const bool bypass_cache = b_.bypass_cache && count == kElements;
    if (store_group<kOrdered>(T{}, out, result, bypass_cache)) [[unlikely]]
      count_nan(result, count);
    if constexpr (kCollecting) collect(offset);
  }

  void count_nan(const V (&result)[kGroup], int count) {
    Raw line[kElements];
    store_group<kOrdered>(T{}, line, result, false);
    uint64_t undecided = 0;
    if constexpr (kCollecting) {
      for (int k = 0; k < p_.experts; ++k) undecided |= open_bits(k);
      undecided = element_mask<kOrdered>(T{}, V{}, undecided);
    }
    for (int j = 0; j < count; ++j) nan_ += line[j] == T::nan && !(undecided >> j & 1);
  }

  PM_HD void finish(const V (&b)[kGroup], const V (&mass)[kGroup], V (&result)[kGroup]) {
    V sum[kGroup], weights[kGroup], side[kGroup];
    if constexpr (S::elect) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        side[g] = elect(mass[g]);
        sum[g] = weights[g] = V::set(0);
      }
      for (int k = 0; k < p_.experts; ++k) {
        const V weight = S::unit ? V::set(1) : V::set(p_.weight[k]);
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          const V v = entries_[k * kGroup + g];
          const Mask agree = agrees(v, side[g]);
          sum[g] = add_where(agree, sum[g], v);
          weights[g] = add_where(agree, weights[g], weight);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
      result[g] = combine<S::base, S::elect>(b[g], mass[g], sum[g], weights[g], V::set(p_.lambda),
                                             V::set(p_.divisor), p_.normalize);
  }

  uint64_t load_field(int k, int which) const {
    uint64_t field;
    memcpy(&field, fields_ + (3 * k + which) * kGroup, sizeof field);
    return field;
  }
  uint64_t open_bits(int k) const { return load_field(k, 1) & ~load_field(k, 0); }

  // Counts what is kept and open per expert, and notes the positions that are undecided for any.
  PM_HD void collect(int64_t offset) {
    uint64_t any = 0;
    for (int k = 0; k < p_.experts; ++k) {
      const uint64_t kept = load_field(k, 0), open = open_bits(k);
      any |= open;
      b_.opened[k] += __builtin_popcountll(open);
      if constexpr (S::collect == Collect::all) {
        b_.kept[k] += __builtin_popcountll(kept);
        b_.above[k] += __builtin_popcountll(load_field(k, 2));
      } else {
        b_.above[k] += __builtin_popcountll(kept);
      }
    }
    b_.undecided[offset / 64] |= element_mask<kOrdered>(T{}, V{}, any) << (offset % 64);
  }

  const MapParams<Work>& p_;
  const MapBlock<Work>& b_;
  V* entries_;  // [experts][kGroup] trimmed, weighted task vectors
  Raw* tail_;   // padded copies of a short last group
  const Raw** tail_expert_;
  uint16_t* fields_;  // [experts][3][kGroup] masks: kept, open or kept, counted
  int64_t nan_ = 0;
};

}  // namespace pm
