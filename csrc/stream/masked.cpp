// Merges where a mask decides what takes part, or where entries fuse by a formula of their own.
#include "further.h"
#include "masks.h"
#include "merge.h"
#include "reduce.h"

namespace pm {

namespace {

template <class Work>
class MaskedMerge {
 public:
  MaskedMerge(const Group<Work>& group, size_t tensor, Crew& crew)
      : group_(group),
        rule_(group.rule()),
        run_(group.run()),
        tensor_(tensor),
        view_(group.views[tensor]),
        crew_(crew),
        params_(rule_) {
    if (rule_.trim != Trim::none) masks_ = std::make_unique<Masks<Work>>(group, view_, crew);
  }

  void merge() {
    if (rule_.rescale) rescale();
    if (rule_.fuse == Fuse::energy) weigh_by_energy();
    if (rule_.fuse == Fuse::overlap && rule_.boost != 0) weigh_by_overlap();
    map();
  }

 private:
  // A block of [first, first + count), loaded, with its masks.
  MapBlock<Work> load(Worker& worker, int64_t first, int64_t count) {
    int64_t at = 0;
    const uint64_t* const* mask = nullptr;
    if (masks_) {
      const auto loaded = masks_->load(worker, first, count);
      at = loaded.at, mask = loaded.mask;
    } else {
      view_.load(worker, first, count);
    }
    MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, at, count);
    block.mask = mask;
    return block;
  }

  void rescale() {
    const int experts = group_.experts();
    const auto sums = ordered_sums(
        crew_, view_.job().count, 2 * experts, [&](int m, int64_t first, int64_t count, double* to) {
          const MapBlock<Work> block = load(run_.workers[size_t(m)], first, count);
          for (int k = 0; k < experts; ++k) {
            if (rule_.density[size_t(k)] >= 1) continue;
            Masses masses{};
            group_.kernels(view_).masses(params_.block, block, k, 0, &masses);
            to[2 * k] = sum_lanes(masses.all), to[2 * k + 1] = sum_lanes(masses.kept);
          }
        });
    masks_->all_made();
    for (int k = 0; k < experts; ++k)
      params_.scale[size_t(k)] =
          rescale_factor<Work>(rule_.density[size_t(k)] >= 1, sums[size_t(2 * k)], sums[size_t(2 * k + 1)]);
  }

  // Each expert's share of the mean squares of what is kept (SCE's "calculate").
  void weigh_by_energy() {
    const int experts = group_.experts();
    auto energy =
        ordered_sums(crew_, view_.job().count, experts, [&](int m, int64_t first, int64_t count, double* to) {
          const MapBlock<Work> block = load(run_.workers[size_t(m)], first, count);
          for (int k = 0; k < experts; ++k) {
            double lanes[kVirtualLanes] = {};
            group_.kernels(view_).energies(block, k, 0, lanes);
            to[k] = sum_lanes(lanes);
          }
        });
    if (masks_) masks_->all_made();
    double total = 0;
    for (double& mean : energy) total += mean /= double(view_.job().count);
    for (int k = 0; k < experts; ++k)
      params_.weight[size_t(k)] = Work(std::fabs(total) < 1e-6 ? 1.0 / experts : energy[size_t(k)] / total);
  }

  // What stands alone is raised by how much of its expert does not.
  void weigh_by_overlap() {
    const int experts = group_.experts();
    std::vector<std::atomic<int64_t>> counts(size_t(experts) * 2);
    const int64_t tile = run_.settings.tile, size = view_.job().count;
    crew_.each((size + tile - 1) / tile, [&](int member, int64_t piece) {
      Worker& worker = run_.workers[size_t(member)];
      const MapBlock<Work> block = load(worker, piece * tile, std::min(tile, size - piece * tile));
      std::vector<int64_t> alone(static_cast<size_t>(experts)), shared(alone);
      void* scratch = worker.scratch.reserve(map_scratch_bytes(experts));
      group_.kernels(view_).overlaps(params_.block, block, alone.data(), shared.data(), scratch);
      for (int k = 0; k < experts; ++k)
        counts[size_t(2 * k)] += alone[size_t(k)], counts[size_t(2 * k + 1)] += shared[size_t(k)];
    });
    for (int k = 0; k < experts; ++k) {
      const double alone = double(counts[size_t(2 * k)]), shared = double(counts[size_t(2 * k + 1)]);
      const double least = rule_.t, share = shared / (alone < least ? least : alone);
      params_.weight[size_t(k)] = Work(1 + rule_.boost * std::clamp(share, 0.0, rule_.most_boost));
    }
  }

  void map() {
    const int64_t size = view_.job().count, step = masks_ ? masks_->step() : run_.settings.tile;
    const KernelSet<Work>& kernels = group_.kernels(view_);
    const MapFn<Work> kernel = rule_.fuse == Fuse::none
                                   ? kernel_for(group_, view_, params_, Collect::no)
                                   : (masks_ ? kernels.fuse_given : kernels.fuse)[int(rule_.fuse)];
    crew_.each((size + step - 1) / step, [&](int member, int64_t piece) {
      Worker& worker = run_.workers[size_t(member)];
      const int64_t first = piece * step, count = std::min(step, size - first);
      const int64_t next = first + step * crew_.size();
      if (next < size) view_.will_need(next, std::min(step, size - next));
      MapBlock<Work> block = load(worker, first, count);
      block.out = view_.result(worker.result, first, count);
      block.bypass_cache = view_.bypass_cache(block.out, size);
      FurtherResults<Work> further(group_, worker, tensor_, first, count);
      void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
      further.attach(&block, 0);
      group_.count_nan(kernel(params_.block, block, scratch));
      view_.store(worker, first, count, block.out);
      further.store();
    });
  }

  const Group<Work>& group_;
  const Rule& rule_;
  RunContext& run_;
  const size_t tensor_;
  const JobView& view_;
  Crew& crew_;
  TensorParams<Work> params_;
  std::unique_ptr<Masks<Work>> masks_;
};

}  // namespace

template <class Work>
void masked_group(const Group<Work>& group, Crew& crew) {
  for (size_t tensor = 0; tensor < group.views.size(); ++tensor)
    MaskedMerge<Work>(group, tensor, crew).merge();
}

template void masked_group(const Group<float>&, Crew&);
template void masked_group(const Group<double>&, Crew&);

}  // namespace pm
