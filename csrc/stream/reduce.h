// Sums over a tensor in the one order of all reductions: blocks side by side, then added up by index.
#pragma once
#include <numeric>

#include "../cpu/parallel.h"
#include "../cpu/stats.h"

namespace pm {

inline double sum_lanes(const double* lanes) { return std::accumulate(lanes, lanes + kVirtualLanes, 0.0); }

// A sum over one row, in the order of all reductions: lanes over each block, then the blocks.
struct RowSum {
  double lanes[kVirtualLanes] = {}, total = 0;
  void close_block() {
    total += sum_lanes(lanes);
    std::fill(lanes, lanes + kVirtualLanes, 0.0);
  }
};

// body(member, first, count, to) adds up one block's `sums` sums, which start at zero.
template <class F>
std::vector<double> ordered_sums(Crew& crew, int64_t count, int sums, F&& body) {
  const int64_t blocks = (count + kReduceBlock - 1) / kReduceBlock;
  std::vector<double> parts(size_t(blocks * sums)), total(static_cast<size_t>(sums));
  crew.each(blocks, [&](int member, int64_t block) {
    const int64_t first = block * kReduceBlock;
    body(member, first, std::min(kReduceBlock, count - first), &parts[size_t(block * sums)]);
  });
  for (int64_t block = 0; block < blocks; ++block)
    for (int s = 0; s < sums; ++s) total[size_t(s)] += parts[size_t(block * sums + s)];
  return total;
}

}  // namespace pm
