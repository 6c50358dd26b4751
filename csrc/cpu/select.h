// Select: the exact k-th largest key of an array.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "../core/cut.h"

namespace pm {

// Keys with their places, ordered as cuts divide them, so that every rank has one holder.
template <class Bits>
class Ranking {
 public:
  struct Holder {
    Bits key;
    int64_t place;
  };

  Ranking(const Bits* keys, int64_t size) : entries_(static_cast<size_t>(size)), bounds_{0, size} {
    for (int64_t i = 0; i < size; ++i) entries_[size_t(i)] = Entry(keys[i]) << 32 | uint32_t(~i);
  }

  // The holder of 1-based `rank` in descending order. Each answer parts the entries, so later ones look
  // through only the part that the rank lies in.
  Holder at(int64_t rank) {
    const auto above = std::upper_bound(bounds_.begin(), bounds_.end(), rank - 1);
    const auto first = entries_.begin();
    std::nth_element(first + *(above - 1), first + rank - 1, first + *above, std::greater<Entry>());
    bounds_.insert(bounds_.insert(above, rank), rank - 1);
    const Entry entry = entries_[size_t(rank - 1)];
    return {Bits(entry >> 32), int64_t(uint32_t(~entry))};
  }

 private:
  using Entry = std::conditional_t<sizeof(Bits) == 4, uint64_t, unsigned __int128>;
  std::vector<Entry> entries_;
  std::vector<int64_t> bounds_;  // ranks at which the entries are parted already
};

}  // namespace pm
