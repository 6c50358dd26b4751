// Rescale: the factor that gives a trimmed task vector its L1 norm back (mergekit 0.1.5), in a fixed order of
// sums.
#include <numeric>

#include "merge.h"

namespace pm {

namespace {

template <class Work>
Masses block_masses(const Group<Work>& group, Worker& worker, const TensorParams<Work>& params, size_t tensor,
                    int k, int64_t first, int64_t count, const std::vector<Cut>& cuts) {
  using Bits = typename WorkTraits<Work>::Bits;
  const JobView& view = group.views[tensor];
  Masses sums{};
  if (group.rule().density[size_t(k)] >= 1) return sums;
  const uint64_t flat = group.flat(tensor, first);
  std::vector<Bits> keep;
  each_segment({cuts}, flat, count, [&](int64_t begin, int64_t size) {
    thresholds_at<Work>(cuts, flat + uint64_t(begin), &keep);
    MapBlock<Work> block = block_at<Work>(worker, view, nullptr, begin, size);
    block.index = uint64_t(first + begin);
    block.cuts = group.cuts(), block.keep_at = cuts.empty() ? nullptr : keep.data();
    group.kernels(view).masses(params.block, block, k, begin, &sums);
  });
  return sums;
}

}  // namespace

// The factor that restores each task vector's L1 norm: one more reading, reduced in a fixed order.
template <class Work>
void rescale(const Group<Work>& group, Crew& crew, const std::vector<Cut>& cuts,
             std::vector<TensorParams<Work>>* params) {
  const int experts = group.experts();
  for (size_t t = 0; t < group.views.size(); ++t) {
    const JobView& view = group.views[t];
    const int64_t blocks = (view.job().count + kReduceBlock - 1) / kReduceBlock;
    std::vector<double> sums(size_t(blocks * experts) * 2);
    crew.each(blocks, [&](int member, int64_t number) {
      Worker& worker = group.run().workers[size_t(member)];
      const int64_t first = number * kReduceBlock, count = std::min(kReduceBlock, view.job().count - first);
      view.load(worker, first, count);
      for (int k = 0; k < experts; ++k) {
        const Masses m = block_masses(group, worker, (*params)[t], t, k, first, count, cuts);
        double* to = &sums[size_t(number * experts + k) * 2];
        to[0] = std::accumulate(m.all, m.all + kVirtualLanes, 0.0);
        to[1] = std::accumulate(m.kept, m.kept + kVirtualLanes, 0.0);
      }
    });
    for (int k = 0; k < experts; ++k) {
      double all = 0, kept = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        all += sums[size_t(b * experts + k) * 2];
        kept += sums[size_t(b * experts + k) * 2 + 1];
      }
      const bool whole = group.rule().density[size_t(k)] >= 1;
      (*params)[t].scale[size_t(k)] = whole || all < 1e-7 || kept < 1e-7 ? Work(1) : Work(all / kept);
    }
  }
}

template void rescale(const Group<float>&, Crew&, const std::vector<Cut>&, std::vector<TensorParams<float>>*);
template void rescale(const Group<double>&, Crew&, const std::vector<Cut>&,
                      std::vector<TensorParams<double>>*);

}  // namespace pm
