// Select: the exact k-th largest key of an array.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "../core/cut.h"

namespace pm {

// Entries in descending order of their keys, as cuts divide them: `before` tells which of two comes first,
// and no two are alike, so that every rank has one holder. They are parted into bins first, by the leading
// bits in which keys differ: that is twice as fast as to part all of them around one rank (16,384 normal
// numbers, Sapphire Rapids: 3.0 ns each against 6.4).
template <class Entry>
class Ranking {
 public:
  using Key = decltype(Entry::key(std::declval<Entry>()));

  // What `memory` must have room for.
  static size_t bytes(int64_t size) { return size_t(size) * sizeof(Entry); }

  // Of entry_at(0), entry_at(1), ...
  template <class EntryAt>
  Ranking(int64_t size, void* memory, EntryAt&& entry_at) : entries_(static_cast<Entry*>(memory)) {
    // Less by one, so that zero, far below all else, is not the least key: it has the last bin.
    Key least = ~Key(0);
    for (int64_t i = 0; i < size; ++i) {
      const Key key = Entry::key(entry_at(i));
      least = std::min<Key>(least, key - 1), most_ = std::max(most_, key);
    }
    least_ = std::max<Key>(least, least + 1);
    const int bin_bits = std::clamp(int(std::bit_width(uint64_t(size))) - kPerBinBits, 0, kMostBinBits);
    shift_ = std::max(0, int(std::bit_width(Key(most_ - std::min(least_, most_)))) - bin_bits);
    bins_.assign((size_t(1) << bin_bits) + 1, 0);
    for (int64_t i = 0; i < size; ++i) ++bins_[bin(Entry::key(entry_at(i))) + 1];
    for (size_t b = 1; b < bins_.size(); ++b) bins_[b] += bins_[b - 1];
    std::vector<int64_t> next(bins_);
    for (int64_t i = 0; i < size; ++i) {
      const Entry entry = entry_at(i);
      entries_[next[bin(Entry::key(entry))]++] = entry;
    }
    parted_ = bins_;
  }

  // The holder of 1-based `rank`. Each answer parts the entries further.
  Entry at(int64_t rank) {
    const auto above = std::upper_bound(parted_.begin(), parted_.end(), rank - 1);
    std::nth_element(entries_ + *(above - 1), entries_ + rank - 1, entries_ + *above, &Entry::before);
    parted_.insert(parted_.insert(above, rank), rank - 1);
    return entries_[rank - 1];
  }

  // How many entries have a larger key, and how many this one.
  struct Counts {
    int64_t larger, equal;
  };
  Counts around(Key key) const {
    Counts counts{bins_[bin(key)], 0};
    for (int64_t i = bins_[bin(key)]; i < bins_[bin(key) + 1]; ++i)
      counts.larger += Entry::key(entries_[i]) > key, counts.equal += Entry::key(entries_[i]) == key;
    return counts;
  }

 private:
  static constexpr int kMostBinBits = 10, kPerBinBits = 4;
  size_t bin(Key key) const { return key < least_ ? bins_.size() - 2 : size_t((most_ - key) >> shift_); }

  Entry* entries_;
  Key most_ = 0, least_ = 0;  // `least_`: but for zero
  int shift_;
  std::vector<int64_t> bins_, parted_;  // ranks at which the entries are parted
};

// A key of an array and its place there, below 2^32, as one number.
template <class Bits>
struct PlacedKey {
  using Number = std::conditional_t<sizeof(Bits) == 4, uint64_t, unsigned __int128>;
  Number number;

  static PlacedKey of(Bits key, int64_t place) { return {Number(key) << 32 | uint32_t(~place)}; }
  static Bits key(PlacedKey entry) { return Bits(entry.number >> 32); }
  int64_t place() const { return int64_t(uint32_t(~number)); }
  static bool before(PlacedKey a, PlacedKey b) { return a.number > b.number; }
};

// The keys of an array; of equal ones the first comes first.
template <class Bits>
class KeyRanking : public Ranking<PlacedKey<Bits>> {
 public:
  KeyRanking(const Bits* keys, int64_t size, void* memory)
      : Ranking<PlacedKey<Bits>>(size, memory,
                                 [keys](int64_t i) { return PlacedKey<Bits>::of(keys[i], i); }) {}
};

}  // namespace pm
