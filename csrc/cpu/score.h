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

// As many doubles as one register holds. Spelled out, as an attribute must not depend on a template's
// argument.
template <int width>
struct Doubles;
template <>
struct Doubles<2> {
  typedef double Value __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
};
template <>
struct Doubles<4> {
  typedef double Value __attribute__((vector_size(32)));
  typedef int64_t Bits __attribute__((vector_size(32)));
};
template <>
struct Doubles<8> {
  typedef double Value __attribute__((vector_size(64)));
  typedef int64_t Bits __attribute__((vector_size(64)));
};

template <class V, class T>
class ScoreKernel {
  using Work = typename T::Work;
  using Raw = typename T::Raw;
  static constexpr int kElements = V::width * kGroup;
  static constexpr int kChunk = 256;
  static_assert(kChunk % kVirtualLanes == 0 && kChunk % kElements == 0);

  static constexpr int kPart = V::width == 16 ? 8 : V::width == 8 ? 4 : 2;
  using Part = typename Doubles<kPart>::Value;
  using PartBits = typename Doubles<kPart>::Bits;

 public:
  // The variance of the experts' task vectors, over experts and not one less. `scratch`: map_scratch_bytes().
  static void variance(const MapBlock<Work>& b, int experts, Work* score, void* scratch) {
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
      store(spread, n, score + at);
    }
  }

  // |d| times its row's factor.
  static void importance(const MapBlock<Work>& b, Work row, Work* score) {
    StatsKernel<V, T>::each_group(b.base, b.expert[0], b.count, [&](const V(&d)[kGroup], int64_t at, int n) {
      V weighed[kGroup];
      for (int g = 0; g < kGroup; ++g) weighed[g] = flip_sign(d[g], sign_bit(d[g])) * V::set(row);
      store(weighed, n, score + at);
    });
  }

  static double most(const void* input, int64_t count) {
    double most = -__builtin_inf();
    each_chunk(input, count, [&](const double* x, int64_t, int n) {
      for (int j = 0; j < n; ++j) most = x[j] > most || x[j] != x[j] ? x[j] : most;
    });
    return most;
  }

  // Adds exp(x - most) to the virtual lanes; the first element belongs to lane 0.
  static void exponentials(const void* input, int64_t count, double most, double* lanes) {
    each_chunk(input, count, [&](double* x, int64_t, int n) {
      exponentials_of(x, most);
      add(x, n, lanes);
    });
  }

  // Adds the terms of the divergence to the virtual lanes.
  static void divergence(const void* base, const void* input, int64_t count, const RowSums& row,
                         double* lanes) {
    double origin[kChunk];
    each_chunk(input, count, [&](double* x, int64_t at, int n) {
      widened(raw(base) + at, n, origin);
      exponentials_of(x, row.most);
      exponentials_of(origin, row.most_base);
      for (int j = 0; j < kChunk; j += kPart) {
        Part a, b;
        memcpy(&a, x + j, sizeof a);
        memcpy(&b, origin + j, sizeof b);
        a = divergence_term<Part, PartBits>(a, Part{} + row.sum, b, Part{} + row.sum_base);
        memcpy(x + j, &a, sizeof a);
      }
      add(x, n, lanes);
    });
  }

 private:
  static const Raw* raw(const void* p) { return static_cast<const Raw*>(p); }

  static void store(const V (&v)[kGroup], int n, Work* to) {
    if (n == kElements) {
      memcpy(to, v, sizeof v);
      return;
    }
    Work line[kElements];
    memcpy(line, v, sizeof v);
    std::copy(line, line + n, to);
  }

  // body(doubles, first element, how many are there): whole chunks, zeros after the last element.
  template <class F>
  static void each_chunk(const void* input, int64_t count, F&& body) {
    double x[kChunk];
    for (int64_t at = 0; at < count; at += kChunk) {
      const int n = int(std::min<int64_t>(kChunk, count - at));
      widened(raw(input) + at, n, x);
      body(x, at, n);
    }
  }

  static void widened(const Raw* input, int n, double* to) {
    for (int j = 0; j < n; ++j) to[j] = double(widen(T{}, input[j]));
    std::fill(to + n, to + kChunk, 0.0);
  }

  static void exponentials_of(double* x, double most) {
    for (int j = 0; j < kChunk; j += kPart) {
      Part v;
      memcpy(&v, x + j, sizeof v);
      v = softmax_exp<Part, PartBits>(v - most);
      memcpy(x + j, &v, sizeof v);
    }
  }

  static void add(const double* x, int n, double* lanes) {
    int j = 0;
    for (; j + kVirtualLanes <= n; j += kVirtualLanes)
      for (int lane = 0; lane < kVirtualLanes; ++lane) lanes[lane] += x[j + lane];
    for (int lane = 0; j < n; ++j, ++lane) lanes[lane] += x[j];
  }
};

}  // namespace pm
