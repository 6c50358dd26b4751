// From a rule to what the kernels take: parameter blocks, thresholds, the kernel itself.
#pragma once
#include <algorithm>

#include "../core/combine.h"
#include "../core/trim.h"
#include "group.h"

namespace pm {

// The parameter block of one tensor with the arrays it points to.
template <class Work>
struct TensorParams {
  std::vector<Work> weight, scale, late;
  MapParams<Work> block;

  explicit TensorParams(const Rule& rule)
      : scale(rule.weight.size(), Work(1)), late(rule.late.begin(), rule.late.end()) {
    Work total = 0;
    for (double w : rule.weight) {
      weight.push_back(Work(w));
      total += Work(w);
    }
    block.experts = int(weight.size());
    block.lambda = Work(rule.lambda);
    block.normalize = rule.normalize;
    block.divisor = combine_divisor(rule.base, total);
    block.t = Work(rule.t);
    block.votes = rule.votes;
    block.weight = weight.data(), block.scale = scale.data();
    block.late = late.empty() ? nullptr : late.data();
  }
  TensorParams(TensorParams&&) = default;  // moved vectors keep their memory, so the block stays true

  bool unit() const {
    auto is_one = [](Work w) { return w == 1; };
    return std::all_of(weight.begin(), weight.end(), is_one) &&
           std::all_of(scale.begin(), scale.end(), is_one) && late.empty();
  }
};

template <class Work>
void thresholds_at(const std::vector<Cut>& cuts, uint64_t flat,
                   std::vector<typename WorkTraits<Work>::Bits>* to) {
  to->resize(cuts.size());
  for (size_t k = 0; k < cuts.size(); ++k) (*to)[k] = threshold_at<Work>(cuts[k], flat);
}

template <class Work>
MapFn<Work> kernel_for(const Group<Work>& group, const JobView& view, const TensorParams<Work>& p,
                       Collect collect) {
  Trim trim = group.rule().trim;
  if (by_mask(trim)) trim = Trim::given;
  if (by_magnitude(trim) && !group.trims()) trim = Trim::none;
  return group.kernels(view).map({group.rule().base, group.rule().elect, p.unit(), trim, collect});
}

// The part of the loaded tile that starts `at` elements in.
template <class Work>
MapBlock<Work> block_at(Worker& worker, const JobView& view, void* out, int64_t at, int64_t count) {
  const int64_t bytes = at * view.kernel_item();
  auto shift = [bytes](const void* p) { return static_cast<const char*>(p) + bytes; };
  worker.block_expert.clear();
  for (const void* expert : worker.tile.expert) worker.block_expert.push_back(shift(expert));
  MapBlock<Work> block;
  block.base = worker.tile.base ? shift(worker.tile.base) : nullptr;
  block.expert = worker.block_expert.data();
  block.out = const_cast<char*>(shift(out));
  block.count = count;
  block.bypass_cache = view.bypass_cache(block.out, view.job().count);
  return block;
}

}  // namespace pm
