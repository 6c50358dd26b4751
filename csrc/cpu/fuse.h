// The fuse kernel: one sweep over the inputs with the formulas of core/fuse.h, for every lane type.
#pragma once
#include "../core/fuse.h"
#include "stats.h"

namespace pm {

template <class V, class T, class Op, bool kMasked>
class FuseKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  static constexpr int kElements = V::width * kGroup;

 public:
  // Returns how many results are NaN. `scratch`: map_scratch_bytes().
  static int64_t run(const MapParams<Work>& p, const MapBlock<Work>& b, void* scratch) {
    auto* deltas = static_cast<V(*)[kGroup]>(scratch);
    Raw padded[2][kElements], line[kElements];
    int64_t nan = 0;
    for (int64_t at = 0; at < b.count; at += kElements) {
      const int n = int(std::min<int64_t>(kElements, b.count - at));
      const bool whole = n == kElements;
      auto from = [&](const void* input, Raw* pad) {
        const Raw* p = static_cast<const Raw*>(input) + at;
        if (whole) return p;
        std::fill(std::copy(p, p + n, pad), pad + kElements, Raw(0));
        return static_cast<const Raw*>(pad);
      };
      V base[kGroup];
      Op op[kGroup];
      load_group<true>(T{}, from(b.base, padded[0]), base);
      for (int g = 0; g < kGroup; ++g) op[g].begin();
      for (int k = 0; k < p.experts; ++k) {
        V x[kGroup];
        typename V::Mask keep[kGroup];
        load_group<true>(T{}, from(b.expert[k], padded[1]), x);
        if (kMasked && b.mask[k]) spread_bits(b.mask[k][at / 64] >> (at % 64), V{}, keep);
        for (int g = 0; g < kGroup; ++g) {
          V d = x[g] - base[g];
          if (kMasked && b.mask[k]) d = keep_where(keep[g], d);
          op[g].take(d, base[g], x[g], k, p);
          if constexpr (Op::twice) deltas[k][g] = d;
        }
      }
      for (int g = 0; g < kGroup; ++g) op[g].turn();
      if constexpr (Op::twice)
        for (int k = 0; k < p.experts; ++k)
          for (int g = 0; g < kGroup; ++g) op[g].again(deltas[k][g], k, p);
      V result[kGroup];
      for (int g = 0; g < kGroup; ++g) result[g] = op[g].result(base[g], p);
      Raw* out = static_cast<Raw*>(b.out) + at;
      const bool any_nan = store_group<true>(T{}, whole ? out : line, result, whole && b.bypass_cache);
      if (!whole) std::copy(line, line + n, out);
      if (any_nan) [[unlikely]] {
        store_group<true>(T{}, line, result, false);
        nan += std::count(line, line + n, Raw(T::nan));
      }
    }
    return nan;
  }

  // Adds to each expert's counts of entries past the threshold: those that stand alone, and the others.
  // `scratch`: map_scratch_bytes().
  static void overlaps(const MapParams<Work>& p, const MapBlock<Work>& b, int64_t* alone, int64_t* shared,
                       void* scratch) {
    auto* past = static_cast<uint64_t*>(scratch);
    for (int64_t at = 0; at < b.count; at += kElements) {
      const int64_t n = std::min<int64_t>(kElements, b.count - at);
      uint64_t once = 0, more = 0;
      for (int k = 0; k < p.experts; ++k) {
        past[k] = 0;
        StatsKernel<V, T>::each_group(shifted(b.base, at), shifted(b.expert[k], at), n,
                                      [&](const V(&d)[kGroup], int64_t, int size) {
                                        typename V::Mask mask[kGroup];
                                        for (int g = 0; g < kGroup; ++g)
                                          mask[g] = FuseOverlap<V>::overlaps(d[g], p);
                                        past[k] = first_bits(group_bits<true, V>(T{}, mask), size);
                                      });
        more |= once & past[k];
        once |= past[k];
      }
      for (int k = 0; k < p.experts; ++k) {
        shared[k] += __builtin_popcountll(past[k] & more);
        alone[k] += __builtin_popcountll(past[k] & ~more);
      }
    }
  }

 private:
  static const void* shifted(const void* p, int64_t elements) {
    return static_cast<const Raw*>(p) + elements;
  }
};

}  // namespace pm
