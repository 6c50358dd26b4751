// Rescale: the factor that gives a trimmed task vector its L1 norm back (mergekit 0.1.5). Sums run in f64 in
// the fixed order of the processor's: 16 virtual lanes over blocks of 65,536 elements.
#pragma once
#include "load.h"

namespace pm::cuda {

constexpr int kBlocksAtOnce = kThreads / kVirtualLanes;

struct RescaleCall {
  Group group;
  Rule rule;
  State state;
  bool random, own_cuts;

  __device__ bool keeps(int64_t tensor, int k, Lane d, uint64_t flat) const {
    const int64_t own = tensor * group.experts + k;
    const auto reaches = [d, flat](const Cut& cut) {
      return trim_magnitude(d, threshold_at<float>(cut, flat));
    };
    const bool keep = reaches(own_cuts ? state.cuts[own] : state.expert[k].cut);
    if (!rule.outliers) return keep;
    return trim_outliers(keep, reaches(own_cuts ? state.drops[own] : state.expert[k].drop));
  }
};

template <class T>
static __global__ void __launch_bounds__(kThreads) sum_masses(const __grid_constant__ RescaleCall c) {
  __shared__ double all[kThreads], kept[kThreads];
  const int lane = int(threadIdx.x) % kVirtualLanes, k = int(blockIdx.y);
  const int64_t number = blockIdx.x * int64_t(kBlocksAtOnce) + threadIdx.x / kVirtualLanes;
  double all_sum = 0, kept_sum = 0;
  if (number < c.group.blocks && !c.rule.whole[k]) {
    const int64_t tensor = c.group.last_at(kFirstBlock, number);
    const Piece block = piece_of(c.group, tensor, number - c.group.row(tensor)[kFirstBlock], kReduceBlock);
    const auto* base = block.template input<typename T::Raw>(kBase);
    const auto* expert = block.template input<typename T::Raw>(kExperts + k);
    for (int64_t i = lane; i < block.count; i += kVirtualLanes) {
      const Lane d = Lane{widen(T{}, expert[i])} - Lane{widen(T{}, base[i])};
      bool keep[1];
      if (c.random)
        random_keep(uint64_t(block.first + i), k, uint64_t(block.row[kKey]), c.rule.limit[k], keep);
      else
        keep[0] = c.keeps(tensor, k, d, block.flat + uint64_t(i));
      const double mass = bit_cast<float>(magnitude(d));
      all_sum += mass;
      kept_sum += keep[0] ? mass : 0.0;
    }
  }
  all[threadIdx.x] = all_sum, kept[threadIdx.x] = kept_sum;
  __syncthreads();
  if (lane != 0 || number >= c.group.blocks) return;
  double* to = c.state.masses + (number * c.group.experts + k) * 2;
  to[0] = to[1] = 0;
  for (int i = 0; i < kVirtualLanes; ++i) to[0] += all[threadIdx.x + i], to[1] += kept[threadIdx.x + i];
}

static __global__ void set_scales(const __grid_constant__ RescaleCall c) {
  const int64_t tensor = blockIdx.x, k = threadIdx.x;
  const int64_t* row = c.group.row(tensor);
  const int64_t blocks = (row[kCount] + kReduceBlock - 1) / kReduceBlock;
  double all = 0, kept = 0;
  for (int64_t b = row[kFirstBlock]; b < row[kFirstBlock] + blocks; ++b) {
    const double* sums = c.state.masses + (b * c.group.experts + k) * 2;
    all += sums[0], kept += sums[1];
  }
  c.state.scale[tensor * c.group.experts + k] = rescale_factor<float>(c.rule.whole[k], all, kept);
}

}  // namespace pm::cuda
