#include "ranks.h"

#include <algorithm>
#include <bit>

namespace pm {

namespace {

constexpr int kMantissa(uint32_t) { return 23; }
constexpr int kMantissa(uint64_t) { return 52; }

void put_bit(uint64_t* bits, int64_t at, bool value) {
  bits[at / 64] = (bits[at / 64] & ~(1ull << (at % 64))) | uint64_t(value) << (at % 64);
}

}  // namespace

// Bins divide each octave evenly, so they order as keys do.
template <class Bits>
void RowRanks<Bits>::count_bins(std::span<const Bits> keys) {
  const int bin_bits = std::clamp(int(std::bit_width(keys.size())) - 1, 5, kMostBits);
  const int shift = kMantissa(Bits{}) - (bin_bits - std::bit_width(unsigned(kOctaves - 1)));
  const int64_t bins = int64_t(1) << bin_bits;
  Bits most = 0;
  for (Bits key : keys) most = std::max(most, key);
  const int64_t offset = int64_t(most >> shift) - (bins - 1);
  bin_.resize(keys.size());
  for (size_t i = 0; i < keys.size(); ++i)
    bin_[i] = uint16_t(std::max<int64_t>(int64_t(keys[i] >> shift) - offset, 0));
  start_.assign(size_t(bins) + 1, 0);
  for (uint16_t bin : bin_) ++start_[size_t(bin) + 1];
  for (size_t b = 1; b < start_.size(); ++b) start_[b] += start_[b - 1];
}

template <class Bits>
void RowRanks<Bits>::decide(std::span<const Bits> keys, int64_t begin, int64_t end, const uint32_t* words,
                            const uint64_t* open, uint64_t* bits, int64_t to) {
  const int64_t last = int64_t(keys.size()) - 1, stop = to + end - begin;
  count_bins(keys);
  // The rank whose limit a word is: exact to less than one rank.
  const double lowest = (density_ - epsilon_) * 0x1p32,
               ranks_per_word = double(last) / (2 * epsilon_ * 0x1p32);
  constexpr double kMargin = 2;
  doubtful_.assign(size_t((stop + 63) / 64 - to / 64), 0);
  for (int64_t word = to / 64; word * 64 < stop; ++word) {
    uint64_t rest = open[word], kept = 0, doubtful = 0;
    if (word == to / 64) rest &= ~0ull << (to % 64);
    if (stop - word * 64 < 64) rest &= (1ull << (stop - word * 64)) - 1;
    for (; rest; rest &= rest - 1) {
      const int bit = std::countr_zero(rest);
      const int64_t i = word * 64 + bit - to;
      const size_t bin = bin_[size_t(begin + i)];
      const double rank = (double(words[i]) - lowest) * ranks_per_word;
      // A limit is rounded down to a word: the next word must be below it before rounding.
      const bool keeps = rank + ranks_per_word + kMargin < double(start_[bin]);
      kept |= uint64_t(keeps) << bit;
      doubtful |= uint64_t(!keeps & (rank - kMargin < double(start_[bin + 1]))) << bit;
    }
    bits[word] |= kept;
    doubtful_[size_t(word - to / 64)] = doubtful;
  }
  sort_out(keys, begin, words, bits, to);
}

template <class Bits>
void RowRanks<Bits>::sort_out(std::span<const Bits> keys, int64_t begin, const uint32_t* words,
                              uint64_t* bits, int64_t to) {
  const int64_t shift = to - begin, origin = to / 64 * 64;
  flagged_.assign(start_.size(), 0);
  bins_.resize(start_.size());
  for (size_t w = 0; w < doubtful_.size(); ++w)
    for (uint64_t rest = doubtful_[w]; rest; rest &= rest - 1) {
      const size_t i = size_t(origin + int64_t(w) * 64 + std::countr_zero(rest) - shift), bin = bin_[i];
      flagged_[bin] = 1;
      bins_[bin] = {0, keys[i], false};
    }
  chosen_.resize(keys.size());
  size_t count = 0;
  for (size_t i = 0; i < keys.size(); ++i) {  // without a branch: which it takes is as good as random
    chosen_[count] = int32_t(i);
    count += flagged_[bin_[i]];
  }
  auto settle = [&](size_t i) {
    const int64_t at = int64_t(i) + shift - origin, rank = start_[bin_[i]] + bins_[bin_[i]].seen++;
    if (at >= 0 && at < int64_t(doubtful_.size()) * 64 && doubtful_[size_t(at / 64)] >> (at % 64) & 1)
      put_bit(bits, at + origin, words[int64_t(i) - begin] < limit(rank, int64_t(keys.size()) - 1));
  };
  bool any_mixed = false;
  for (size_t c = count; c-- > 0;) {
    const size_t i = size_t(chosen_[c]);
    Bin& bin = bins_[bin_[i]];
    bin.mixed |= keys[i] != bin.key;
    any_mixed |= bin.mixed;
    settle(i);  // right where all the bin's keys are equal
  }
  if (!any_mixed) return;
  chosen_.resize(count);
  std::erase_if(chosen_, [&](int32_t i) { return !bins_[bin_[size_t(i)]].mixed; });
  std::sort(chosen_.begin(), chosen_.end(), [&](int32_t a, int32_t b) {
    return keys[size_t(a)] != keys[size_t(b)] ? keys[size_t(a)] < keys[size_t(b)] : a > b;
  });
  for (int32_t i : chosen_) bins_[bin_[size_t(i)]].seen = 0;
  for (int32_t i : chosen_) settle(size_t(i));
}

template class RowRanks<uint32_t>;
template class RowRanks<uint64_t>;

}  // namespace pm
