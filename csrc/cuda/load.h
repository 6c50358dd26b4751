// Elements on their way between memory and registers.
#pragma once
#include "../core/combine.h"
#include "../core/elect.h"
#include "../core/lane.h"
#include "../core/trim.h"
#include "group.h"

namespace pm::cuda {

using Lane = Scalar<float>;

template <class T>
constexpr int kVector = 16 / int(sizeof(typename T::Raw));

// Elements as they are stored: one, or a vector that is loaded and stored in one go.
template <class T, int kCount>
struct Stored {
  using Raw = typename T::Raw;
  static_assert(kCount == 1 || kCount == kVector<T>);
  Raw raw[kCount];

  __device__ void load(const Raw* from, bool active) {
    if constexpr (kCount == 1) {
      raw[0] = active ? *from : Raw(0);
    } else {
      const uint4 line = active ? load_line(from) : uint4{0, 0, 0, 0};
      memcpy(raw, &line, sizeof raw);
    }
  }
  __device__ void store(Raw* to, bool active) const {
    if (!active) return;
    if constexpr (kCount == 1) {
      *to = raw[0];
    } else {
      uint4 line;
      memcpy(&line, raw, sizeof raw);
      store_line(to, line);
    }
  }
  __device__ void widened(Lane (&to)[kCount]) const {
    if constexpr (T::dtype == DType::bf16 && kCount > 1) {  // two to a word: one shift, one mask
      uint32_t word[kCount / 2];
      memcpy(word, raw, sizeof raw);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        to[e] = {bit_cast<float>(e % 2 ? word[e / 2] & 0xffff0000u : word[e / 2] << 16)};
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) to[e] = {widen(T{}, raw[e])};
    }
  }
  __device__ void narrowed(const Lane (&from)[kCount]) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) raw[e] = narrow(T{}, from[e].x);
  }
};

// The magnitude of one entry as a key: all NaN are equal.
template <class T>
__device__ inline uint32_t key_of(const int64_t* row, int expert, int64_t at) {
  using Raw = typename T::Raw;
  const Lane base{widen(T{}, reinterpret_cast<const Raw*>(row[kBase])[at])};
  const Lane value{widen(T{}, reinterpret_cast<const Raw*>(row[kExperts + expert])[at])};
  const uint32_t bits = magnitude(value - base);
  return bits < WorkTraits<float>::nan_key ? bits : WorkTraits<float>::nan_key;
}

// Whether a key is kept under a cut.
PM_HD bool reaches(const Cut& cut, uint32_t key, uint64_t index) {
  return key >= threshold_at<float>(cut, index);
}

// The keep masks of random trim for elements from `index` of their tensor: one, or whole groups.
template <int kCount>
__device__ inline void random_keep(uint64_t index, int expert, uint64_t key, uint32_t limit,
                                   bool (&keep)[kCount]) {
#pragma unroll
  for (int g = 0; g < kCount; g += kGroup) {
    const uint64_t first = index / kGroup * kGroup + uint64_t(g);
    uint32_t word[kGroup];
    random_words(first, uint32_t(expert), key, Lane{}, word);
#pragma unroll
    for (int e = 0; e < kGroup && e < kCount; ++e)
      keep[g + e] = word[kCount == 1 ? index % kGroup : e] < limit;
  }
}

}  // namespace pm::cuda
