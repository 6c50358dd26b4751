// Vectors of 16 bytes, and the parts of vectors at the ends of tensors.
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

// Elements [at, at + count) of `from`, `count` at most kCount; what is missing is zero.
template <class T, int kCount>
__device__ inline void load(const typename T::Raw* from, int64_t at, int count, bool aligned,
                            Lane (&to)[kCount]) {
  typename T::Raw raw[kCount] = {};
  if (kCount == kVector<T> && aligned && count == kCount) {
    const uint4 line = load_line(from + at);
    memcpy(raw, &line, sizeof raw);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < count) raw[e] = from[at + e];
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) to[e] = {widen(T{}, raw[e])};
}

template <class T, int kCount>
__device__ inline void store(typename T::Raw* to, int64_t at, int count, bool aligned,
                             const Lane (&from)[kCount]) {
  typename T::Raw raw[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) raw[e] = narrow(T{}, from[e].x);
  if (kCount == kVector<T> && aligned && count == kCount) {
    uint4 line;
    memcpy(&line, raw, sizeof raw);
    store_line(to + at, line);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < count) to[at + e] = raw[e];
  }
}

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

// The keep masks of random trim for a vector that starts at `index` of its tensor, a multiple of 4.
template <int kCount>
__device__ inline void random_vector(uint64_t index, int expert, uint64_t key, uint32_t limit,
                                     bool (&keep)[kCount]) {
#pragma unroll
  for (int g = 0; g < kCount; g += kGroup) {
    bool group[kGroup];
    random_group(index + uint64_t(g), uint32_t(expert), uint32_t(key), uint32_t(key >> 32), limit, Lane{}, group);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) keep[g + e] = group[e];
  }
}

}  // namespace pm::cuda
