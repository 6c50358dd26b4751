// Rescale by thresholds: the factor that gives a trimmed task vector its L1 norm back (mergekit 0.1.5); one
// more reading of the inputs.
#include "merge.h"
#include "reduce.h"

namespace pm {

namespace {

template <class Work>
Masses block_masses(const Group<Work>& group, Worker& worker, const TensorParams<Work>& params, size_t tensor,
                    int k, int64_t first, int64_t count, const std::vector<Cut>& cuts) {
  using Bits = typename WorkTraits<Work>::Bits;
  const JobView& view = group.views[tensor];
  const uint64_t flat = group.flat(tensor, first);
  Masses sums{};
  std::vector<Bits> keep;
  each_segment({cuts}, flat, count, [&](int64_t begin, int64_t size) {
    thresholds_at<Work>(cuts, flat + uint64_t(begin), &keep);
    MapBlock<Work> block = block_at<Work>(worker, view, nullptr, begin, size);
    block.cuts = group.cuts(), block.keep_at = keep.data();
    group.kernels(view).masses(params.block, block, k, begin, &sums);
  });
  return sums;
}

}  // namespace

template <class Work>
void rescale(const Group<Work>& group, Crew& crew, const std::vector<Cut>& cuts,
             std::vector<TensorParams<Work>>* params) {
  const int experts = group.experts();
  const std::vector<double>& density = group.rule().density;
  for (size_t t = 0; t < group.views.size(); ++t) {
    const JobView& view = group.views[t];
    TensorParams<Work>& here = (*params)[t];
    const auto sums = ordered_sums(
        crew, view.job().count, 2 * experts, [&](int m, int64_t first, int64_t count, double* to) {
          Worker& worker = group.run().workers[size_t(m)];
          view.load(worker, first, count);
          for (int k = 0; k < experts; ++k) {
            if (density[size_t(k)] >= 1) continue;
            const Masses masses = block_masses(group, worker, here, t, k, first, count, cuts);
            to[2 * k] = sum_lanes(masses.all), to[2 * k + 1] = sum_lanes(masses.kept);
          }
        });
    for (int k = 0; k < experts; ++k)
      here.scale[size_t(k)] =
          rescale_factor<Work>(density[size_t(k)] >= 1, sums[size_t(2 * k)], sums[size_t(2 * k + 1)]);
  }
}

template void rescale(const Group<float>&, Crew&, const std::vector<Cut>&, std::vector<TensorParams<float>>*);
template void rescale(const Group<double>&, Crew&, const std::vector<Cut>&,
                      std::vector<TensorParams<double>>*);

}  // namespace pm
