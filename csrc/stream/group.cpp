#include "group.h"

#include <algorithm>

namespace pm {

template <class Work>
Group<Work>::Group(RunContext& run, int64_t number, const std::vector<int64_t>& jobs)
    : number(number), run_(run), rule_(run.rules[size_t(run.jobs[size_t(jobs[0])].rule)]) {
  DType kernel = JobView::natural_kernel(run.jobs[size_t(jobs[0])]);
  for (int64_t job : jobs) {
    const DType natural = JobView::natural_kernel(run.jobs[size_t(job)]);
    if (natural != kernel) kernel = natural == DType::f64 || kernel == DType::f64 ? DType::f64 : DType::f32;
  }
  views.reserve(jobs.size());
  for (int64_t job : jobs) {
    views.emplace_back(run, run.jobs[size_t(job)], job, kernel);
    origins.push_back(size);
    size += uint64_t(run.jobs[size_t(job)].count);
  }
  if (!by_magnitude(rule_.trim)) return;
  const size_t experts = rule_.density.size();
  ranks_.resize(rule_.trim == Trim::outliers ? 2 * experts : experts);
  for (size_t k = 0; k < experts; ++k)
    if (rule_.trim == Trim::outliers) {
      const OutlierRanks ranks = outlier_ranks(rule_.density[k], rule_.gamma[k], int64_t(size));
      ranks_[k] = ranks.reached, ranks_[experts + k] = ranks.dropped;
    } else {
      ranks_[k] = kept_entries(rule_.density[k], int64_t(size), rule_.one_more);
    }
}

template <class Work>
Group<Work>::Group(const Group& whole, int expert, std::vector<int64_t> ranks)
    : number(whole.number),
      origins(whole.origins),
      size(whole.size),
      run_(whole.run_),
      rule_(whole.rule_),
      ranks_(std::move(ranks)) {
  for (const JobView& view : whole.views) {
    Part& part = *parts_.emplace_back(std::make_unique<Part>());
    part.job = view.job();
    part.input[0] = view.job().input[0], part.input[1] = view.job().input[1 + expert];
    part.job.input = part.input, part.job.inputs = 2;
    views.emplace_back(run_, part.job, view.number(), view.kernel_dtype());
  }
}

template <class Work>
bool Group<Work>::trims() const {
  for (int cut = 0; cut < cuts(); ++cut)
    if (rank(cut) != (cut < experts() ? -1 : 0)) return true;
  return false;
}

template <class Work>
bool Group<Work>::is_whole() const {
  if (views.size() != 1) return false;
  const int64_t bytes = int64_t(size) * views[0].job().inputs * views[0].kernel_item();
  return bytes <= run_.settings.cached;
}

template <class Work>
bool Group<Work>::searched() const {
  return std::any_of(ranks_.begin(), ranks_.end(), [](int64_t rank) { return rank > 0; });
}

template <class Work>
int64_t Group<Work>::piece_count(int64_t piece) const {
  if (piece_size_ != piece) {
    piece_starts_.assign(1, 0);
    for (const auto& view : views)
      piece_starts_.push_back(piece_starts_.back() + (view.job().count + piece - 1) / piece);
    piece_size_ = piece;
  }
  return piece_starts_.back();
}

template <class Work>
typename Group<Work>::Piece Group<Work>::piece(int64_t number, int64_t piece) const {
  const auto next = std::upper_bound(piece_starts_.begin(), piece_starts_.end(), number);
  const size_t tensor = size_t(next - piece_starts_.begin()) - 1;
  const int64_t first = (number - piece_starts_[tensor]) * piece;
  return {tensor, first, std::min(piece, views[tensor].job().count - first)};
}

template class Group<float>;
template class Group<double>;

}  // namespace pm
