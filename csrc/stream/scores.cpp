#include "scores.h"

#include <sys/mman.h>

#include <cmath>

#include "reduce.h"

namespace pm {

template <class Work>
Scores<Work>::Scores(const Group<Work>& group, const JobView& view, Crew& crew)
    : group_(group),
      run_(group.run()),
      view_(view),
      tile_(run_.settings.tile),
      pieces_((view_.job().count + tile_ - 1) / tile_) {
  const bool by_variance = group.rule().trim == Trim::variance;
  if (by_variance && group.rule().density[0] >= 1) return;
  if (!by_variance) weigh_rows(crew);
  const int64_t bytes = view_.job().count * int64_t(sizeof(Bits));
  if (bytes <= run_.settings.memory / int64_t(run_.workers.size())) {
    kept_ = run_.workers[size_t(crew.size() - 1)].scores.template reserve_for<Bits>(
        size_t(view_.job().count + kMaxGroup));
    // In large pages: the faults of small ones took 4 of arcee_fusion's 15 ns an element.
    madvise(kept_, size_t(bytes), MADV_HUGEPAGE);
  }
  cut_ = by_variance ? cut_by_variance(crew) : cut_by_importance(crew);
}

template <class Work>
const typename Scores<Work>::Bits* Scores<Work>::keys(Worker& worker, int64_t at, int64_t first,
                                                      int64_t count) const {
  if (made_) return kept_ + first;
  Bits* scores = kept_ ? kept_ + first : worker.scores.template reserve_for<Bits>(size_t(count + kMaxGroup));
  make(worker, at, first, count, scores);
  return scores;
}

template <class Work>
void Scores<Work>::make(Worker& worker, int64_t at, int64_t first, int64_t count, Bits* to) const {
  const KernelSet<Work>& kernels = group_.kernels(view_);
  if (group_.rule().trim == Trim::variance) {
    const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, at, count);
    void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
    kernels.variance(block, group_.experts(), to, scratch);
    return;
  }
  const int64_t width = view_.row();
  for (int64_t begin = 0; begin < count;) {
    const int64_t row = (first + begin) / width;
    const int64_t size = std::min(count - begin, (row + 1) * width - first - begin);
    kernels.importance(block_at<Work>(worker, view_, nullptr, at + begin, size), row_[size_t(row)],
                       to + begin);
    begin += size;
  }
}

// How far each row's softmax has moved from the base's (Kullback and Leibler's divergence).
template <class Work>
void Scores<Work>::weigh_rows(Crew& crew) {
  const int64_t width = view_.row(), rows = view_.job().count / width;
  const int64_t together = std::max<int64_t>(1, tile_ / width);
  row_.resize(size_t(rows));
  crew.each((rows + together - 1) / together, [&](int member, int64_t number) {
    Worker& worker = run_.workers[size_t(member)];
    const int64_t first = number * together, count = std::min(together, rows - first);
    if (width <= tile_) view_.load(worker, first * width, count * width);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t start = width <= tile_ ? row * width : -(first + row) * width;
      row_[size_t(first + row)] = row_divergence(worker, start, width);
    }
  });
}

// Of the row that starts `start` elements into the loaded tile; a negative start: a row too long for a tile,
// which is loaded piece by piece from there in the tensor.
template <class Work>
Work Scores<Work>::row_divergence(Worker& worker, int64_t start, int64_t width) const {
  const KernelSet<Work>& kernels = group_.kernels(view_);
  const bool loaded = width <= tile_;
  const int64_t step = std::min(tile_, kReduceBlock), room = (loaded ? width : step) + kMaxGroup;
  auto* over_base = worker.scratch.template reserve_for<double>(size_t(2 * room));
  double* over_input = over_base + room;
  // Pieces that lie in one block of the sums each. body(base, input, first element, how many, sums to close)
  auto each_piece = [&](std::initializer_list<RowSum*> sums, auto&& body) {
    for (int64_t at = 0, count; at < width; at += count) {
      count = std::min({step, width - at, kReduceBlock - at % kReduceBlock});
      if (!loaded) view_.load(worker, at - start, count);
      const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, loaded ? start + at : 0, count);
      body(block.base, block.expert[0], loaded ? at : 0, count);
      if (at + count < width && (at + count) % kReduceBlock) continue;
      for (RowSum* sum : sums) sum->close_block();
    }
  };
  RowSums row{-HUGE_VAL, -HUGE_VAL, 0, 0};
  each_piece({}, [&](const void* base, const void* input, int64_t, int64_t count) {
    auto larger = [](double a, double b) { return b > a || b != b ? b : a; };
    row.most_base = larger(row.most_base, kernels.most(base, count));
    row.most = larger(row.most, kernels.most(input, count));
  });
  RowSum sum_base, sum, divergence;
  auto exponentials = [&](const void* base, const void* input, int64_t at, int64_t count) {
    kernels.exponentials(base, count, row.most_base, sum_base.lanes, over_base + at);
    kernels.exponentials(input, count, row.most, sum.lanes, over_input + at);
  };
  each_piece({&sum_base, &sum}, exponentials);
  row.sum_base = sum_base.total, row.sum = sum.total;
  each_piece({&divergence}, [&](const void* base, const void* input, int64_t at, int64_t count) {
    if (!loaded) exponentials(base, input, at, count);
    kernels.divergence(over_base + at, over_input + at, count, row, divergence.lanes);
  });
  return Work(divergence.total < 0 ? 0 : divergence.total);
}

template <class Work>
std::span<const typename Scores<Work>::Bits> Scores<Work>::piece_keys(int member, int64_t piece) const {
  Worker& worker = run_.workers[size_t(member)];
  const int64_t first = piece * tile_, count = std::min(tile_, view_.job().count - first);
  if (!made_) view_.load(worker, first, count);
  return {keys(worker, 0, first, count), size_t(count)};
}

// The int(density * n) largest, n counting those that are not zero; of equal ones the lowest index first.
template <class Work>
Cut Scores<Work>::cut_by_variance(Crew& crew) {
  std::atomic<int64_t> zeros{0};
  bool counted = false;
  auto keys_of = [&](int member, int64_t piece, const auto& body) {
    const auto keys = piece_keys(member, piece);
    if (!counted) zeros += std::count(keys.begin(), keys.end(), Bits(0));
    body(0, keys);
  };
  DigitSearch<Bits> search(crew, pieces_, view_.job().count, 1, keys_of, true);
  search.count();
  counted = true, made_ = kept_ != nullptr;
  const double density = std::max(group_.rule().density[0], 0.0);
  const int64_t rank = int64_t(density * double(view_.job().count - zeros.load()));
  if (rank == 0) return Cut::keep_none();
  const RankSearch found = search.run({rank})[0];
  if (found.rank == found.sharing) return {found.prefix, Cut::kAllIndices};
  const auto place = search.places()[0];
  return {found.prefix, uint64_t(place.piece * tile_ + place.at) + 1};
}

// What lies 1.5 interquartile ranges above the median, or more (Tukey's fence, with the median for the upper
// quartile).
template <class Work>
Cut Scores<Work>::cut_by_importance(Crew& crew) {
  const int64_t size = view_.job().count;
  std::vector<int64_t> quartiles;
  for (int64_t quarter = 1; quarter <= 3; ++quarter) quartiles.push_back(size - (size - 1) * quarter / 4);
  auto keys_of = [&](int member, int64_t piece, const auto& body) { body(0, piece_keys(member, piece)); };
  DigitSearch<Bits> search(crew, pieces_, size, quartiles.size(), keys_of, true);
  search.count();
  made_ = kept_ != nullptr;
  const auto found = search.run(quartiles);
  auto value = [&](int s) { return bit_cast<Work>(Bits(found[size_t(s)].prefix)); };
  const Work fence = value(1) + Work(1.5) * (value(2) - value(0));
  return {std::min<Bits>(bit_cast<Bits>(fence) & ~WorkTraits<Work>::sign, WorkTraits<Work>::nan_key),
          Cut::kAllIndices};
}

template class Scores<float>;
template class Scores<double>;

}  // namespace pm
