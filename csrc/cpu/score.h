// Scores: one number for each element that a trim ranks instead of each expert's magnitudes; and the sums
// over rows that one of them needs.
#pragma once
#include "../core/softmax.h"
#include "stats.h"

namespace pm {

// One row of an input against the base's: the largest elements, then sums of exponentials below them.
struct RowSums {
  double most_base, most, sum_base, sum;
};

template <class V, class T>
class ScoreKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  using Bits = typename WorkTraits<Work>::Bits;
  using Gram = GramKernel<V, T>;
  static constexpr int kElements = V::width * kGroup;
  static constexpr int kChunk = 256;
  static_assert(kChunk % kVirtualLanes == 0 && kChunk % kElements == 0);

  static constexpr int kPart = pm::kPart<V>, kParts = kVirtualLanes / kPart;
  using Part = typename Doubles<kPart>::Value;
  using PartBits = typename Doubles<kPart>::Bits;
  static constexpr int kSide = std::min(kParts, 4);  // vectors side by side: 16 numbers, or 8

 public:
  // The variance of the experts' task vectors, over experts and not one less, as keys. `scratch`:
  // map_scratch_bytes().
  static void variance(const MapBlock<Work>& b, int experts, Bits* score, void* scratch) {
    V* deltas = static_cast<V*>(scratch);
    const V count = V::set(Work(experts));
    for (int64_t at = 0; at < b.count; at += kElements) {
      const int n = int(std::min<int64_t>(kElements, b.count - at));
      V mean[kGroup], spread[kGroup];
      for (int g = 0; g < kGroup; ++g) mean[g] = spread[g] = V::set(0);
      for (int k = 0; k < experts; ++k)
        StatsKernel<V, T>::each_group(raw(b.base) + at, raw(b.expert[k]) + at, n,
                                      [&](const V(&d)[kGroup], int64_t, int) {
                                        for (int g = 0; g < kGroup; ++g) {
                                          deltas[k * kGroup + g] = d[g];
                                          mean[g] = mean[g] + d[g];
                                        }
                                      });
      for (int g = 0; g < kGroup; ++g) mean[g] = mean[g] / count;
      for (int k = 0; k < experts; ++k)
        for (int g = 0; g < kGroup; ++g) {
          const V off = deltas[k * kGroup + g] - mean[g];
          spread[g] = spread[g] + off * off;
        }
      for (int g = 0; g < kGroup; ++g) spread[g] = spread[g] / count;
      StatsKernel<V, T>::store_keys(spread, n, score + at);
    }
  }

  // |d| times its row's factor, as keys.
  static void importance(const MapBlock<Work>& b, Work row, Bits* score) {
    StatsKernel<V, T>::each_group(b.base, b.expert[0], b.count, [&](const V(&d)[kGroup], int64_t at, int n) {
      V weighed[kGroup];
      for (int g = 0; g < kGroup; ++g) weighed[g] = flip_sign(d[g], sign_bit(d[g])) * V::set(row);
      StatsKernel<V, T>::store_keys(weighed, n, score + at);
    });
  }

  // The largest element, NaN where there is one.
  static double most(const void* input, int64_t count) {
    Part most[kParts];
    for (Part& part : most) part = Part{} - __builtin_inf();
    double x[kChunk], last = -__builtin_inf();
    auto larger = [](double a, double b) { return b > a || b != b ? b : a; };
    for (int64_t at = 0; at < count; at += kChunk) {
      const int n = int(std::min<int64_t>(kChunk, count - at)), whole = n / kVirtualLanes * kVirtualLanes;
      Gram::widened(nullptr, input, at, n, x);
      for (int j = 0; j < whole; j += kVirtualLanes)
        for (int p = 0; p < kParts; ++p) {
          const Part v = load_doubles<kPart>(x + j + p * kPart);
          most[p] = v > most[p] ? v : most[p];
          most[p] = v != v ? v : most[p];
        }
      for (int j = whole; j < n; ++j) last = larger(last, x[j]);
    }
    for (const Part& part : most)
      for (int j = 0; j < kPart; ++j) last = larger(last, part[j]);
    return last;
  }

  // Adds exp(x - most) to the virtual lanes, of which the first element's is 0, and leaves them in `to`,
  // which has room for a group more.
  static void exponentials(const void* input, int64_t count, double most, double* lanes, double* to) {
    LaneSums<V> sum(lanes, 0);
    for (int64_t at = 0; at < count; at += kChunk, to += kChunk) {
      const int n = int(std::min<int64_t>(kChunk, count - at));
      Gram::widened(nullptr, input, at, n, to);
      for (int j = 0; j < n; j += kSide * kPart) {
        Part x[kSide];
        for (int s = 0; s < kSide; ++s) x[s] = load_doubles<kPart>(to + j + s * kPart) - most;
        softmax_exp<PartBits>(x);
        for (int s = 0; s < kSide; ++s) store_doubles<kPart>(x[s], to + j + s * kPart);
      }
      sum.add(to, n);
    }
    sum.store(lanes, 0);
  }

  // Adds the terms of the divergence to the virtual lanes, from the exponentials of both rows, which have
  // room for a group more.
  static void divergence(const double* base, const double* input, int64_t count, const RowSums& row,
                         double* lanes) {
    LaneSums<V> sum(lanes, 0);
    double terms[kChunk];
    for (int64_t at = 0; at < count; at += kChunk) {
      const int n = int(std::min<int64_t>(kChunk, count - at));
      for (int j = 0; j < n; j += kSide * kPart) {
        Part x[kSide], origin[kSide];
        for (int s = 0; s < kSide; ++s) {
          x[s] = load_doubles<kPart>(input + at + j + s * kPart);
          origin[s] = load_doubles<kPart>(base + at + j + s * kPart);
        }
        divergence_terms<PartBits>(x, row.sum, origin, row.sum_base);
        for (int s = 0; s < kSide; ++s) store_doubles<kPart>(x[s], terms + j + s * kPart);
      }
      sum.add(terms, n);
    }
    sum.store(lanes, 0);
  }

  // One bit for each key that reaches `least`; bits past `count` are anything. There is room for a group of
  // keys more.
  static void reach(const Bits* keys, int64_t count, Bits least, uint64_t* bits) {
    using Stored = std::conditional_t<sizeof(Bits) == 4, F32, F64>;
    for (int64_t at = 0; at < count; at += 64) {
      uint64_t word = 0;
      for (int part = 0; part < 64 && at + part < count; part += kElements) {
        V v[kGroup];
        typename V::Mask mask[kGroup];
        load_group<true>(Stored{}, keys + at + part, v);
        for (int g = 0; g < kGroup; ++g) mask[g] = trim_magnitude(v[g], least);
        word |= first_bits(group_bits<true, V>(Stored{}, mask), kElements) << part;
      }
      bits[at / 64] = word;
    }
  }

 private:
  static const Raw* raw(const void* p) { return static_cast<const Raw*>(p); }
};

}  // namespace pm
