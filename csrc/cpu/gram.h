// The Gram kernel: inner products of all pairs of inputs in f64, in the fixed order of every reduction.
#pragma once
#include "map.h"

namespace pm {

constexpr int kVirtualLanes = 16;        // partial sums of a reduction, the same on every processor
constexpr int64_t kReduceBlock = 65536;  // elements that are summed before blocks are added in order
constexpr int kGramChunk = 256;          // elements that are widened at a time: nine inputs stay in 18 KiB

// As many doubles as one register holds. Spelled out, as an attribute must not depend on a template's
// argument.
template <int width>
struct Doubles;
template <>
struct Doubles<2> {
  typedef double Value __attribute__((vector_size(16)));
  typedef double Loose __attribute__((vector_size(16), aligned(8), may_alias));  // in memory
  typedef int64_t Bits __attribute__((vector_size(16)));
};
template <>
struct Doubles<4> {
  typedef double Value __attribute__((vector_size(32)));
  typedef double Loose __attribute__((vector_size(32), aligned(8), may_alias));  // in memory
  typedef int64_t Bits __attribute__((vector_size(32)));
};
template <>
struct Doubles<8> {
  typedef double Value __attribute__((vector_size(64)));
  typedef double Loose __attribute__((vector_size(64), aligned(8), may_alias));  // in memory
  typedef int64_t Bits __attribute__((vector_size(64)));
};
template <class V>
constexpr int kPart = V::width == 16  ? 8
                      : V::width == 8 ? 4
                                      : 2;
// Through a pointer and not by memcpy, which the compiler may do in halves: a load would wait for two stores.
template <int width>
PM_HD typename Doubles<width>::Value load_doubles(const double* p) {
  return *reinterpret_cast<const typename Doubles<width>::Loose*>(p);
}
template <int width>
PM_HD void store_doubles(typename Doubles<width>::Value v, double* p) {
  *reinterpret_cast<typename Doubles<width>::Loose*>(p) = v;
}

// Pairs (i, j) with i <= j, row by row.
constexpr int pair_count(int inputs) { return inputs * (inputs + 1) / 2; }
constexpr size_t gram_scratch(int inputs) { return size_t(inputs) * kGramChunk; }

template <class V, class T>
class GramKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  static constexpr int kElements = V::width * kGroup;
  static_assert(kGramChunk % kMaxGroup == 0);

  using Part = typename Doubles<kPart<V>>::Value;
  static constexpr int kPart = pm::kPart<V>, kParts = kVirtualLanes / kPart;
  // How many pairs fit beside their inputs.
  static constexpr int kSide = V::width == 16 ? 4 : V::width == 8 ? 2 : 1;

 public:
  // Adds the products of `count` elements, of which the first belongs to lane 0, to `lanes`: kVirtualLanes
  // sums for each pair. Inputs are taken relative to `base` where there is one. `scratch`: gram_scratch().
  static void run(const void* base, const void* const* input, int inputs, int64_t count, double* lanes,
                  double* scratch) {
    for (int64_t at = 0; at < count; at += kGramChunk) {
      const int n = int(std::min<int64_t>(kGramChunk, count - at));
      for (int k = 0; k < inputs; ++k) widened(base, input[k], at, n, scratch + k * kGramChunk);
      const int steps = (n + kVirtualLanes - 1) / kVirtualLanes;
      double* to = lanes;
      for (int i = 0; i < inputs; ++i) {
        const double* a = scratch + i * kGramChunk;
        int j = i;
        for (; j + kSide <= inputs; j += kSide, to += kSide * kVirtualLanes)
          products<kSide>(a, scratch + j * kGramChunk, steps, to);
        for (; j < inputs; ++j, to += kVirtualLanes) products<1>(a, scratch + j * kGramChunk, steps, to);
      }
    }
  }

  // Elements [at, at + n) as doubles, in whole groups, zeros after the last: a zero added to a sum
  // that started at +0 changes no bit.
  PM_HD static void widened(const void* base, const void* input, int64_t at, int n, double* to) {
    const Raw* b = base ? static_cast<const Raw*>(base) + at : nullptr;
    const Raw* x = static_cast<const Raw*>(input) + at;
    int first = 0;
    for (; first + kElements <= n; first += kElements) group(b ? b + first : nullptr, x + first, to + first);
    if (first < n) {
      Raw padded[kElements] = {}, padded_base[kElements] = {};
      std::copy(x + first, x + n, padded);
      if (b) std::copy(b + first, b + n, padded_base);
      group(b ? padded_base : nullptr, padded, to + first);
      first += kElements;
    }
    for (; first % kVirtualLanes; ++first) to[first] = 0;
  }

 private:
  PM_HD static void group(const Raw* base, const Raw* input, double* to) {
    V v[kGroup], b[kGroup];
    load_group<true>(T{}, input, v);
    if (base) {
      load_group<true>(T{}, base, b);
      for (int g = 0; g < kGroup; ++g) v[g] = v[g] - b[g];
    }
    Part wide[kElements / kPart];
    widen_group(v, wide);
#pragma GCC unroll 8
    for (int p = 0; p < kElements / kPart; ++p) store_doubles<kPart>(wide[p], to + p * kPart);
  }

  // kPairs products side by side: one alone would wait for its own additions.
  template <int kPairs>
  PM_HD static void products(const double* a, const double* b, int steps, double* lanes) {
    Part sum[kPairs][kParts];
    memcpy(sum, lanes, sizeof sum);
    for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int at = step * kVirtualLanes + part * kPart;
        Part x;
        memcpy(&x, a + at, sizeof x);
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
          Part y;
          memcpy(&y, b + p * kGramChunk + at, sizeof y);
          sum[p][part] += x * y;
        }
      }
    }
    memcpy(lanes, sum, sizeof sum);
  }
};

}  // namespace pm
