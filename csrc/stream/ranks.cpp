#include "ranks.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

namespace pm {

namespace {

constexpr int kMantissa(uint32_t) { return 23; }
constexpr int kMantissa(uint64_t) { return 52; }
// Octaves below the largest key; what is smaller shares a bin. Fewer would put more into that bin, more would
// put several keys into others: differences of bfloat16 seldom have more bits than are left for bins here.
constexpr int kOctaves = 8;

// 2,048 bins for rows of 4,096, whose tables stay in the first-level cache; more for long rows.
int bits_of_bins(int64_t size) {
  const int width = std::bit_width(uint64_t(size));
  return std::clamp(width - 1, 5, std::clamp(width - 5, 11, 16));
}

}  // namespace

template <class Work>
RowRanks<Work>::RowRanks(const KernelSet<Work>& kernels, double density, double epsilon, int64_t size)
    : kernels_(kernels), density_(density), epsilon_(epsilon), last_(size - 1), half_(size / 2) {
  lowest_ = limit(0);
  highest_ = limit(last_);
  bin_bits_ = bits_of_bins(size);
  shift_ = kMantissa(Bits{}) - (bin_bits_ - std::bit_width(unsigned(kOctaves - 1)));
  // The rank r whose limit a word w is: (w - lowest) * last / words, with `words` = highest - lowest. Both
  // limits are rounded down to words, as is the limit of r: each of the three moves r by last / (words - 1)
  // at most, which is at most 2 * last / words where there are two words or more (where there is one the
  // margin takes in all ranks). Rounding down what is here, the product, and r itself moves it by one rank
  // each.
  const int64_t words = int64_t(highest_) - lowest_;
  if (words <= 0) return;
  ranks_per_word_ = (uint64_t(last_) << 32) / uint64_t(words);
  margin_ = std::min(4 + 6 * last_ / words, last_ + 1);
}

// Bins divide each octave evenly, so they order as keys do; zeros, of which there are many, have their own.
template <class Work>
void RowRanks<Work>::count_bins(std::span<const Bits> keys, Bits most) {
  const size_t bins = size_t(1) << bin_bits_, size = keys.size();
  const Bits top = most >> shift_;
  bin_.resize(size);
  loose_.resize(size + 8);
  kernels_.bins(keys.data(), int64_t(size), shift_, top + 2 <= bins ? 0 : Bits(top + 2 - bins), bin_.data(),
                loose_.data());
  front_.assign(bins, 0);
  start_.assign(bins, 0);
  count_seen();
  slack_.assign(bins, int32_t(margin_));
  for (size_t i = 0; i < size; i += 8) {
    uint64_t eight;
    memcpy(&eight, &loose_[i], sizeof eight);
    if (!eight) continue;
    for (size_t j = i; j < std::min(i + 8, size); ++j)
      if (loose_[j])
        slack_[bin_[j]] = int32_t(std::min<int64_t>(margin_ + front_[bin_[j]] + start_[bin_[j]], INT32_MAX));
  }
  int32_t lower = 0;
  for (size_t b = 0; b < bins; ++b) {
    const int32_t front = front_[b], back = start_[b];
    front_[b] = lower + back;
    start_[b] = lower;
    lower += front + back;
  }
}

// From the row's end, both halves side by side: a counter that is raised twice in a row waits for itself.
template <class Work>
void RowRanks<Work>::count_seen() {
  const size_t half = size_t(half_), size = bin_.size();
  seen_.resize(size);
  const uint16_t* bin = bin_.data();
  int32_t *front = front_.data(), *back = start_.data(), *seen = seen_.data();
  if (size % 2) seen[size - 1] = back[bin[size - 1]]++;
  for (size_t i = half; i-- > 0;) {
    seen[half + i] = back[bin[half + i]]++;
    seen[i] = front[bin[i]]++;
  }
}

template <class Work>
void RowRanks<Work>::decide(std::span<const Bits> keys, Bits most, int64_t begin, int64_t end,
                            const uint32_t* words, const uint64_t* open, uint64_t* bits, int64_t to) {
  const int64_t stop = to + end - begin;
  count_bins(keys, most);
  left_.clear();
  const int32_t *seen = seen_.data(), *slack = slack_.data();
  const int64_t margin = margin_;
  for (int64_t word = to / 64; word * 64 < stop; ++word) {
    uint64_t rest = open[word], kept = 0;
    if (word == to / 64) rest &= ~0ull << (to % 64);
    if (stop - word * 64 < 64) rest &= (1ull << (stop - word * 64)) - 1;
    for (; rest; rest &= rest - 1) {
      const int bit = std::countr_zero(rest);
      const int64_t i = word * 64 + bit - to, at = begin + i;
      const size_t bin = bin_[size_t(at)];
      const int64_t rank = (at < half_ ? front_ : start_)[bin] + seen[at];
      const int64_t ahead = rank - rank_of(words[i]);
      bool keeps = ahead > 0;
      if (std::abs(ahead) <= slack[bin]) [[unlikely]] {
        const bool exact = slack[bin] == margin;
        if (!exact) left_.push_back(int32_t(at));
        keeps = exact && words[i] < limit(rank);
      }
      kept |= uint64_t(keeps) << bit;
    }
    bits[word] |= kept;
  }
  if (!left_.empty()) sort_out(keys, begin, words, bits, to);
}

template <class Work>
void RowRanks<Work>::sort_out(std::span<const Bits> keys, int64_t begin, const uint32_t* words,
                              uint64_t* bits, int64_t to) {
  flagged_.assign(start_.size(), 0);
  for (int32_t at : left_) flagged_[bin_[size_t(at)]] = 1;
  entries_.resize(keys.size() + 1);
  size_t count = 0;
  for (size_t at = 0; at < keys.size(); ++at) {  // without a branch: which it takes is as good as random
    entries_[count] = entry(keys, at);
    count += flagged_[bin_[at]];
  }
  std::sort(entries_.begin(), entries_.begin() + int64_t(count));
  auto place = [&](Entry e) {
    return std::lower_bound(entries_.begin(), entries_.begin() + int64_t(count), e) - entries_.begin();
  };
  // Ranks within a bin count from its lowest key on, which is the first entry of the bin.
  std::vector<int32_t> first(start_.size(), -1);
  for (size_t c = count; c-- > 0;) first[bin_[~uint32_t(entries_[c])]] = int32_t(c);
  for (int32_t at : left_) {
    const size_t bin = bin_[size_t(at)];
    const int64_t rank = start_[bin] + place(entry(keys, size_t(at))) - first[bin], bit = at - begin + to;
    bits[bit / 64] |= uint64_t(words[at - begin] < limit(rank)) << (bit % 64);
  }
}

template class RowRanks<float>;
template class RowRanks<double>;

}  // namespace pm
