#include "masks.h"

#include "reduce.h"

namespace pm {

template <class Work>
Masks<Work>::Masks(const Group<Work>& group, const JobView& view, Crew& crew)
    : group_(group), run_(group.run()), view_(view), words_((view_.job().count + 63) / 64) {
  const Trim trim = group.rule().trim;
  if (trim == Trim::variance || trim == Trim::importance) {
    scores_ = std::make_unique<Scores<Work>>(group, view, crew);
    if (group.rule().fuse == Fuse::none) return;  // one reading more: the mask is needed once
  }
  const int64_t bytes = words_ * 8 * masks();
  if (bytes <= run_.settings.memory / int64_t(run_.workers.size()))
    kept_ = run_.workers[size_t(crew.size() - 1)].bitmaps.template reserve_for<uint64_t>(size_t(bytes / 8));
  if (kept_ && ranked() && view.row() > kReduceBlock) make_rows(crew);
}

// Pieces as long as rows cut each row once; those of the sums would have a long row ranked for every piece.
template <class Work>
void Masks<Work>::make_rows(Crew& crew) {
  const int64_t size = view_.job().count, step = (view_.row() + 63) / 64 * 64;
  crew.each((size + step - 1) / step, [&](int member, int64_t piece) {
    load(run_.workers[size_t(member)], piece * step, std::min(step, size - piece * step));
  });
  all_made();
}

template <class Work>
int64_t Masks<Work>::step() const {
  return ranked() ? kReduceBlock
                  : run_.settings.tile;  // ranks are of whole rows, so few pieces should cut one
}

template <class Work>
typename Masks<Work>::Loaded Masks<Work>::load(Worker& worker, int64_t first, int64_t count) {
  int64_t from = first, to = first + count;
  if (ranked() && !made_) {
    const int64_t width = view_.row();
    from = first / width * width;
    to = (to + width - 1) / width * width;
  }
  view_.load(worker, from, to - from);
  const int experts = group_.experts();
  const int64_t words = (count + 63) / 64;
  uint64_t* made = kept_ ? nullptr : worker.bitmaps.template reserve_for<uint64_t>(size_t(words * masks()));
  auto bits_of = [&](int k) { return kept_ ? kept_ + k * words_ + first / 64 : made + k * words; };
  worker.mask.resize(size_t(experts));
  if (scored()) {
    const bool all = scores_->cut().magnitude == 0 && scores_->cut().index == Cut::kAllIndices;
    if (!all && !made_) compare(worker, first - from, first, count, bits_of(0));
    std::fill(worker.mask.begin(), worker.mask.end(), all ? nullptr : bits_of(0));
    return {first - from, worker.mask.data()};
  }
  for (int k = 0; k < experts; ++k) {
    uint64_t* bits = bits_of(k);
    worker.mask[size_t(k)] = whole(k) ? nullptr : bits;
    if (made_ || whole(k)) continue;
    ranked() ? draw_ranked(worker, k, first - from, first, count, bits) : draw(worker, k, first, count, bits);
  }
  return {first - from, worker.mask.data()};
}

template <class Work>
void Masks<Work>::draw(Worker& worker, int k, int64_t first, int64_t count, uint64_t* to) const {
  constexpr int64_t kAtOnce = 1024;  // words that stay in the first-level cache
  auto* words = worker.words.template reserve_for<uint32_t>(kAtOnce + kDrawRoom);
  const uint32_t limit = random_limit(group_.rule().density[size_t(k)]);
  for (int64_t at = 0; at < count; at += kAtOnce) {
    const int64_t size = std::min(kAtOnce, count - at);
    kernels().words(uint64_t(first + at), size, k, view_.job().key, words);
    kernels().below(words, size, limit, to + at / 64);
  }
}

template <class Work>
void Masks<Work>::draw_ranked(Worker& worker, int k, int64_t at, int64_t first, int64_t count,
                              uint64_t* to) const {
  const int64_t width = view_.row();
  const double density = group_.rule().density[size_t(k)];
  RowRanks<Work> ranks(group_.kernels(view_), density, group_.rule().epsilon[size_t(k)], width);
  if (density <= 0) {
    std::fill(to, to + (count + 63) / 64, 0);
    return;
  }
  auto* words = worker.words.template reserve_for<uint32_t>(size_t(count + kDrawRoom));
  kernels().words(uint64_t(first), count, k, view_.job().key, words);
  kernels().below(words, count, ranks.lowest(), to);
  const uint32_t highest = ranks.highest();
  if (highest == ranks.lowest()) return;
  std::vector<uint64_t> open(size_t((count + 63) / 64));
  kernels().below(words, count, highest, open.data());
  for (size_t w = 0; w < open.size(); ++w) open[w] &= ~to[w];
  auto* keys = worker.keys.template reserve_for<Bits>(size_t(width));
  for (int64_t row = -at; row < count; row += width) {  // rows from where the tile starts
    const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, at + row, width);
    const Bits most = group_.kernels(view_).row_keys(block.base, block.expert[k], width, keys);
    const int64_t begin = std::max<int64_t>(0, -row), end = std::min(width, count - row);
    ranks.decide({keys, size_t(width)}, most, begin, end, words + row + begin, open.data(), to, row + begin);
  }
}

template <class Work>
void Masks<Work>::compare(Worker& worker, int64_t at, int64_t first, int64_t count, uint64_t* to) const {
  const Bits* keys = scores_->keys(worker, at, first, count);
  each_segment({{&scores_->cut(), 1}}, uint64_t(first), count, [&](int64_t begin, int64_t size) {
    const int64_t word = begin / 64;
    const uint64_t before = (1ull << (begin % 64)) - 1, made = before ? to[word] & before : 0;
    group_.kernels(view_).reach(keys + word * 64, begin + size - word * 64,
                                threshold_at<Work>(scores_->cut(), uint64_t(first + begin)), to + word);
    to[word] = (to[word] & ~before) | made;
  });
}

template class Masks<float>;
template class Masks<double>;

}  // namespace pm
