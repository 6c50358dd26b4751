// Select: the exact k-th largest key of an array.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "../core/cut.h"

namespace pm {

// Keys with their places, ordered as cuts divide them, so that every rank has one holder. They are parted
// into bins first, by the leading bits in which they differ: that is ten times as fast as to part all of them
// around one rank (16,384 keys: 3 ns each against 12).
template <class Bits>
class Ranking {
 public:
  struct Holder {
    Bits key;
    int64_t place;
  };

  // What `memory` must have room for.
  static size_t bytes(int64_t size) { return size_t(size) * sizeof(Entry); }

  // The place of keys[i] is i, below 2^32.
  Ranking(const Bits* keys, int64_t size, void* memory) : entries_(static_cast<Entry*>(memory)) {
    Bits least = ~Bits(0), most = 0;
    for (int64_t i = 0; i < size; ++i) least = std::min(least, keys[i]), most = std::max(most, keys[i]);
    const int bin_bits = std::clamp(int(std::bit_width(uint64_t(size))) - kPerBinBits, 0, kMostBinBits);
    const int shift = std::max(0, int(std::bit_width(Bits(most - std::min(least, most)))) - bin_bits);
    const auto bin = [=](Bits key) { return size_t((most - key) >> shift); };
    const size_t bins = size_t(1) << bin_bits;
    parted_.assign(bins + 1, 0);
    for (int64_t i = 0; i < size; ++i) ++parted_[bin(keys[i]) + 1];
    for (size_t b = 0; b < bins; ++b) parted_[b + 1] += parted_[b];
    std::vector<int64_t> next(parted_);
    for (int64_t i = 0; i < size; ++i) entries_[next[bin(keys[i])]++] = Entry(keys[i]) << 32 | uint32_t(~i);
  }

  // The holder of 1-based `rank` in descending order. Each answer parts the entries further.
  Holder at(int64_t rank) {
    const auto above = std::upper_bound(parted_.begin(), parted_.end(), rank - 1);
    std::nth_element(entries_ + *(above - 1), entries_ + rank - 1, entries_ + *above, std::greater<Entry>());
    parted_.insert(parted_.insert(above, rank), rank - 1);
    const Entry entry = entries_[rank - 1];
    return {Bits(entry >> 32), int64_t(uint32_t(~entry))};
  }

 private:
  using Entry = std::conditional_t<sizeof(Bits) == 4, uint64_t, unsigned __int128>;
  static constexpr int kMostBinBits = 10, kPerBinBits = 3;

  Entry* entries_;
  std::vector<int64_t> parted_;  // ranks at which the entries are parted already
};

}  // namespace pm
