#include "group.h"

#include <algorithm>

namespace pm {

template <class Work>
Group<Work>::Group(RunContext& run, int64_t number, const std::vector<int64_t>& jobs)
    : number(number), run_(run) {
  DType kernel = JobView::natural_kernel(run.jobs[size_t(jobs[0])]);
  for (int64_t job : jobs) {
    const DType natural = JobView::natural_kernel(run.jobs[size_t(job)]);
    if (natural != kernel) kernel = natural == DType::f64 || kernel == DType::f64 ? DType::f64 : DType::f32;
  }
  views.reserve(jobs.size());
  for (int64_t job : jobs) {
    views.emplace_back(run, job, kernel);
    origins.push_back(size);
    size += uint64_t(run.jobs[size_t(job)].count);
  }
}

template <class Work>
int64_t Group<Work>::rank(int cut) const {
  const size_t k = size_t(expert_of(cut));
  if (rule().trim != Trim::outliers) return kept_entries(rule().density[k], int64_t(size), rule().one_more);
  const OutlierRanks ranks = outlier_ranks(rule().density[k], rule().gamma[k], int64_t(size));
  return cut < experts() ? ranks.reached : ranks.dropped;
}

template <class Work>
bool Group<Work>::trims() const {
  for (int cut = 0; cut < cuts(); ++cut)
    if (rank(cut) != (cut < experts() ? -1 : 0)) return true;
  return false;
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
