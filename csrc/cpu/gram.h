// The Gram kernel: inner products of all pairs of inputs in f64, in the fixed order of every reduction.
#pragma once
#include "map.h"

namespace pm {

constexpr int kVirtualLanes = 16;        // partial sums of a reduction, the same on every processor
constexpr int64_t kReduceBlock = 65536;  // elements that are summed before blocks are added in order
constexpr int kGramChunk = 256;          // elements that are widened at a time: nine inputs stay in 18 KiB

// Pairs (i, j) with i <= j, row by row.
constexpr int pair_count(int inputs) { return inputs * (inputs + 1) / 2; }
constexpr size_t gram_scratch(int inputs) { return size_t(inputs) * kGramChunk; }

template <class V, class T>
class GramKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  static constexpr int kElements = V::width * kGroup;
  static_assert(kGramChunk % kMaxGroup == 0);

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
        for (; j + 4 <= inputs; j += 4, to += 4 * kVirtualLanes)
          products<4>(a, scratch + j * kGramChunk, steps, to);
        for (; j < inputs; ++j, to += kVirtualLanes) products<1>(a, scratch + j * kGramChunk, steps, to);
      }
    }
  }

 private:
  // Elements as doubles, zeros after the last: a zero added to a sum that started at +0 changes no bit.
  PM_HD static void widened(const void* base, const void* input, int64_t at, int n, double* to) {
    const Raw* b = static_cast<const Raw*>(base);
    const Raw* x = static_cast<const Raw*>(input) + at;
    for (int first = 0; first < n; first += kElements) {
      const int left = std::min(kElements, n - first);
      Raw padded[kElements] = {}, padded_base[kElements] = {};
      const Raw *from = x + first, *base_from = b ? b + at + first : padded_base;
      if (left < kElements) {
        from = std::copy_n(x + first, left, padded) - left;
        if (b) base_from = std::copy_n(b + at + first, left, padded_base) - left;
      }
      V v[kGroup], vb[kGroup];
      load_group<true>(T{}, from, v);
      if (b) {
        load_group<true>(T{}, base_from, vb);
        for (int g = 0; g < kGroup; ++g) v[g] = v[g] - vb[g];
      }
      Work line[kElements];
      memcpy(line, v, sizeof line);
      for (int j = 0; j < kElements; ++j) to[first + j] = double(line[j]);
    }
    const int end = (n + kElements - 1) / kElements * kElements;
    for (int j = end; j % kVirtualLanes; ++j) to[j] = 0;
  }

  // kPairs products side by side: one alone would wait for its own additions.
  template <int kPairs>
  PM_HD static void products(const double* a, const double* b, int steps, double* lanes) {
    double sum[kPairs][kVirtualLanes];
    memcpy(sum, lanes, sizeof sum);
    for (int step = 0; step < steps; ++step) {
      const double* x = a + step * kVirtualLanes;
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        const double* y = b + p * kGramChunk + step * kVirtualLanes;
#pragma GCC unroll 16
        for (int lane = 0; lane < kVirtualLanes; ++lane) sum[p][lane] += x[lane] * y[lane];
      }
    }
    memcpy(lanes, sum, sizeof sum);
  }
};

}  // namespace pm
