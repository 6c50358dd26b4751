#include "scores.h"

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
  if (group.rule().trim == Trim::importance) weigh_rows(crew);
  const int64_t bytes = view_.job().count * int64_t(sizeof(Work));
  if (bytes <= run_.settings.memory / int64_t(run_.workers.size())) {
    Work* all =
        run_.workers[size_t(crew.size() - 1)].scores.template reserve_for<Work>(size_t(view_.job().count));
    crew.each(pieces_, [&](int member, int64_t piece) {
      Worker& worker = run_.workers[size_t(member)];
      const int64_t first = piece * tile_, count = std::min(tile_, view_.job().count - first);
      view_.load(worker, first, count);
      make(worker, 0, first, count, all + first);
    });
    kept_ = all;
  }
  cut_ = group.rule().trim == Trim::importance ? cut_by_importance(crew) : cut_by_variance(crew);
}

template <class Work>
const typename Scores<Work>::Bits* Scores<Work>::keys(Worker& worker, int64_t at, int64_t first,
                                                      int64_t count) const {
  const Work* scores = kept_ ? kept_ + first : nullptr;
  if (!scores) {
    Work* made = worker.scores.template reserve_for<Work>(size_t(count));
    make(worker, at, first, count, made);
    scores = made;
  }
  return reinterpret_cast<const Bits*>(scores);
}

template <class Work>
void Scores<Work>::make(Worker& worker, int64_t at, int64_t first, int64_t count, Work* to) const {
  const KernelSet<Work>& kernels = group_.kernels(view_);
  if (group_.rule().trim == Trim::variance) {
    const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, at, count);
    void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
    kernels.variance(block, group_.experts(), to, scratch);
  } else {
    const int64_t width = view_.row();
    for (int64_t begin = 0; begin < count;) {
      const int64_t row = (first + begin) / width;
      const int64_t size = std::min(count - begin, (row + 1) * width - first - begin);
      kernels.importance(block_at<Work>(worker, view_, nullptr, at + begin, size), row_[size_t(row)],
                         to + begin);
      begin += size;
    }
  }
  // NaNs of every kind are one key, the highest.
  auto* bits = reinterpret_cast<Bits*>(to);
  for (int64_t i = 0; i < count; ++i)
    bits[i] = std::min<Bits>(bits[i] & ~WorkTraits<Work>::sign, WorkTraits<Work>::nan_key);
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
  const int64_t step = width <= tile_ ? width : tile_ / kReduceBlock ? kReduceBlock : tile_;
  auto each_piece = [&](auto&& body) {
    for (int64_t at = 0; at < width; at += step) {
      const int64_t count = std::min(step, width - at);
      if (width > tile_) view_.load(worker, at - start, count);
      const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, width > tile_ ? 0 : start, count);
      body(block.base, block.expert[0], at, count);
    }
  };
  // The fixed order of sums: lanes over each block of the row, then the blocks.
  double total = 0, lanes[kVirtualLanes] = {};
  auto sum_over = [&](auto&& add) {
    total = 0;
    each_piece([&](const void* base, const void* input, int64_t at, int64_t count) {
      for (int64_t begin = 0; begin < count;) {
        const int64_t size = std::min(count - begin, kReduceBlock - (at + begin) % kReduceBlock);
        add(view_.shifted(base, begin), view_.shifted(input, begin), size, lanes);
        begin += size;
        if ((at + begin) % kReduceBlock && at + begin < width) continue;
        total += sum_lanes(lanes);
        std::fill(lanes, lanes + kVirtualLanes, 0.0);
      }
    });
    return total;
  };
  RowSums row{-HUGE_VAL, -HUGE_VAL, 0, 0};
  each_piece([&](const void* base, const void* input, int64_t, int64_t count) {
    auto larger = [](double a, double b) { return b > a || b != b ? b : a; };
    row.most_base = larger(row.most_base, kernels.most(base, count));
    row.most = larger(row.most, kernels.most(input, count));
  });
  row.sum_base = sum_over([&](const void* base, const void*, int64_t count, double* to) {
    kernels.exponentials(base, count, row.most_base, to);
  });
  row.sum = sum_over([&](const void*, const void* input, int64_t count, double* to) {
    kernels.exponentials(input, count, row.most, to);
  });
  const double divergence = sum_over([&](const void* base, const void* input, int64_t count, double* to) {
    kernels.divergence(base, input, count, row, to);
  });
  return Work(divergence < 0 ? 0 : divergence);
}

template <class Work>
std::span<const typename Scores<Work>::Bits> Scores<Work>::piece_keys(int member, int64_t piece) const {
  Worker& worker = run_.workers[size_t(member)];
  const int64_t first = piece * tile_, count = std::min(tile_, view_.job().count - first);
  if (!kept_) view_.load(worker, first, count);
  return {keys(worker, 0, first, count), size_t(count)};
}

template <class Work>
typename DigitSearch<typename Scores<Work>::Bits>::KeysOf Scores<Work>::keys_of() const {
  return [this](int member, int64_t piece, const auto& body) { body(0, piece_keys(member, piece)); };
}

// The int(density * n) largest, n counting those that are not zero; of equal ones the lowest index first.
template <class Work>
Cut Scores<Work>::cut_by_variance(Crew& crew) {
  const double density = group_.rule().density[0];
  if (density >= 1) return Cut::keep_all();
  std::atomic<int64_t> not_zero{0};
  crew.each(pieces_, [&](int member, int64_t piece) {
    const auto keys = piece_keys(member, piece);
    not_zero += int64_t(keys.size()) - std::count(keys.begin(), keys.end(), Bits(0));
  });
  const int64_t rank = int64_t(std::max(density, 0.0) * double(not_zero.load()));
  if (rank == 0) return Cut::keep_none();
  DigitSearch<Bits> search(crew, pieces_, {{rank}}, keys_of(), true);
  const uint64_t key = search.run()[0].prefix;
  const auto place = search.places()[0];
  return {key, uint64_t(place.piece * tile_ + place.at) + 1};
}

// What lies 1.5 interquartile ranges above the median, or more (Tukey's fence, with the median for the upper
// quartile).
template <class Work>
Cut Scores<Work>::cut_by_importance(Crew& crew) {
  const int64_t size = view_.job().count;
  std::vector<RankSearch> quartiles;
  for (int64_t quarter = 1; quarter <= 3; ++quarter) quartiles.push_back({size - (size - 1) * quarter / 4});
  DigitSearch<Bits> search(crew, pieces_, quartiles, keys_of(), true);
  const auto found = search.run();
  auto value = [&](int s) { return bit_cast<Work>(Bits(found[size_t(s)].prefix)); };
  const Work fence = value(1) + Work(1.5) * (value(2) - value(0));
  return {std::min<Bits>(bit_cast<Bits>(fence) & ~WorkTraits<Work>::sign, WorkTraits<Work>::nan_key),
          Cut::kAllIndices};
}

template class Scores<float>;
template class Scores<double>;

}  // namespace pm
