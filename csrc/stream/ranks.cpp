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
  flagged_.assign(size_t(bins), 0);
}

template <class Bits>
void RowRanks<Bits>::decide(std::span<const Bits> keys, int64_t begin, int64_t end, const uint32_t* words,
                            const uint64_t* open, uint64_t* bits, int64_t to) {
  const int64_t last = int64_t(keys.size()) - 1;
  count_bins(keys);
  // The rank whose limit a word is: exact to less than one rank.
  const double lowest = (density_ - epsilon_) * 0x1p32,
               ranks_per_word = double(last) / (2 * epsilon_ * 0x1p32);
  constexpr double kMargin = 2;
  bool any_flagged = false;
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t at = to + i;
    const uint64_t rest = open[at / 64] >> (at % 64);
    if (!rest) {  // nothing open in what is left of this word
      i += 63 - at % 64;
      continue;
    }
    if (!(rest & 1)) {
      i += std::countr_zero(rest) - 1;
      continue;
    }
    const size_t bin = bin_[size_t(begin + i)];
    const double rank = (double(words[i]) - lowest) * ranks_per_word;
    if (rank + kMargin < double(start_[bin])) {
      bits[at / 64] |= 1ull << (at % 64);
    } else if (rank - kMargin < double(start_[bin + 1])) {
      flagged_[bin] = 1;
      any_flagged = true;
    }
  }
  if (any_flagged) sort_out(keys, begin, end, words, bits, to);
}

template <class Bits>
void RowRanks<Bits>::sort_out(std::span<const Bits> keys, int64_t begin, int64_t end, const uint32_t* words,
                              uint64_t* bits, int64_t to) {
  const int64_t last = int64_t(keys.size()) - 1;
  members_.resize(std::max(members_.size(), flagged_.size()));
  for (size_t i = 0; i < keys.size(); ++i)
    if (flagged_[bin_[i]]) members_[bin_[i]].emplace_back(keys[i], -int64_t(i));
  for (size_t bin = 0; bin < flagged_.size(); ++bin) {
    if (!flagged_[bin]) continue;
    auto& members = members_[bin];
    const auto one_key = std::all_of(members.begin(), members.end(),
                                     [&](const auto& member) { return member.first == members[0].first; });
    one_key ? std::reverse(members.begin(), members.end()) : std::sort(members.begin(), members.end());
    for (size_t place = 0; place < members.size(); ++place) {
      const int64_t i = -members[place].second - begin;
      if (i >= 0 && i < end - begin)
        put_bit(bits, to + i, words[i] < limit(start_[bin] + int64_t(place), last));
    }
    members.clear();
  }
}

template class RowRanks<uint32_t>;
template class RowRanks<uint64_t>;

}  // namespace pm
