// Fills the kernel tables for one lane type; included by exactly one source file per instruction set.
#pragma once
#include "kernels.h"

namespace pm {

template <class V, class T, Trim kTrim, bool kElect, bool kUnit>
void fill_by_collect(MapFn<typename T::Work> (&kernel)[3]) {
  kernel[int(Collect::no)] = MapKernel<V, T, Shape<true, kTrim, kElect, kUnit>>::run;
  kernel[int(Collect::first)] = MapKernel<V, T, Shape<true, kTrim, kElect, kUnit, Collect::first>>::run;
  kernel[int(Collect::all)] = MapKernel<V, T, Shape<true, kTrim, kElect, kUnit, Collect::all>>::run;
}

template <class V, class T, bool kMasked>
void fill_fuses(MapFn<typename T::Work> (&kernel)[kFuses]) {
  kernel[int(Fuse::none)] = nullptr;
  kernel[int(Fuse::swap)] = FuseKernel<V, T, FuseSwap<V>, kMasked>::run;
  kernel[int(Fuse::overlap)] = FuseKernel<V, T, FuseOverlap<V>, kMasked>::run;
  kernel[int(Fuse::energy)] = FuseKernel<V, T, FuseEnergy<V>, kMasked>::run;
  kernel[int(Fuse::largest)] = FuseKernel<V, T, FuseLargest<V>, kMasked>::run;
  kernel[int(Fuse::elected)] = FuseKernel<V, T, FuseElected<V>, kMasked>::run;
  kernel[int(Fuse::consensus)] = FuseKernel<V, T, FuseConsensus<V>, kMasked>::run;
}

template <class V, class T>
KernelSet<typename T::Work> make_kernel_set() {
  constexpr Trim none = Trim::none, magnitude = Trim::magnitude, given = Trim::given;
  KernelSet<typename T::Work> set;
  set.linear = MapKernel<V, T, Shape<false, none, false, false>>::run;
  set.sum = MapKernel<V, T, Shape<true, none, false, false>>::run;
  set.sum_given = MapKernel<V, T, Shape<true, given, false, false>>::run;
  set.elect = MapKernel<V, T, Shape<true, none, true, false>>::run;
  set.elect_unit = MapKernel<V, T, Shape<true, none, true, true>>::run;
  set.elect_given = MapKernel<V, T, Shape<true, given, true, false>>::run;
  fill_by_collect<V, T, magnitude, false, false>(set.sum_magnitude);
  fill_by_collect<V, T, magnitude, true, false>(set.elect_magnitude);
  fill_by_collect<V, T, magnitude, true, true>(set.elect_magnitude_unit);
  fill_by_collect<V, T, Trim::outliers, false, false>(set.sum_outliers);
  fill_by_collect<V, T, Trim::outliers, true, false>(set.elect_outliers);
  set.keys = StatsKernel<V, T>::keys;
  set.row_keys = RankKernel<V, T>::row_keys;
  set.bins = RankKernel<V, T>::bins;
  set.open_keys = StatsKernel<V, T>::open_keys;
  set.count_open = StatsKernel<V, T>::count_open;
  set.search = StatsKernel<V, T>::search;
  set.masses = StatsKernel<V, T>::masses;
  set.energies = StatsKernel<V, T>::energies;
  fill_fuses<V, T, false>(set.fuse);
  fill_fuses<V, T, true>(set.fuse_given);
  set.overlaps = FuseKernel<V, T, FuseOverlap<V>, false>::overlaps;
  set.variance = ScoreKernel<V, T>::variance;
  set.importance = ScoreKernel<V, T>::importance;
  set.reach = ScoreKernel<V, T>::reach;
  set.most = ScoreKernel<V, T>::most;
  set.exponentials = ScoreKernel<V, T>::exponentials;
  set.divergence = ScoreKernel<V, T>::divergence;
  set.gram = GramKernel<V, T>::run;
  return set;
}

template <class V, class From, class To>
void convert_elements(const void* from, void* to, int64_t count) {
  constexpr int n = V::width * kGroup;
  const auto* source = static_cast<const typename From::Raw*>(from);
  auto* target = static_cast<typename To::Raw*>(to);
  int64_t at = 0;
  V v[kGroup];
  for (; at + n <= count; at += n) {
    load_group<true>(From{}, source + at, v);
    store_group<true>(To{}, target + at, v, false);
  }
  if (at == count) return;
  typename From::Raw padded[n] = {};
  typename To::Raw result[n];
  std::copy(source + at, source + count, padded);
  load_group<true>(From{}, padded, v);
  store_group<true>(To{}, result, v, false);
  std::copy(result, result + (count - at), target + at);
}

template <class V>
IsaKernels make_isa_kernels() {
  return {{make_kernel_set<V, BF16>(), make_kernel_set<V, F16>(), make_kernel_set<V, F32>()},
          {DrawKernel<V>::words, DrawKernel<V>::below},
          {convert_elements<V, BF16, F32>, convert_elements<V, F16, F32>, convert_elements<V, F32, F32>},
          {convert_elements<V, F32, BF16>, convert_elements<V, F32, F16>, convert_elements<V, F32, F32>}};
}

}  // namespace pm
