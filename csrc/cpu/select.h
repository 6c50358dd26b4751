// Select: the exact k-th largest key of an array, without moving the array.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace pm {

// A cut divides keys, ordered by magnitude and then by lower flat index first: everything above `magnitude`
// is kept, and of what equals it, the indices below `index`.
struct Cut {
  uint64_t magnitude = 0;
  uint64_t index = kAllIndices;
  static constexpr uint64_t kAllIndices = ~0ull;

  static constexpr Cut keep_all() { return {0, kAllIndices}; }
  static constexpr Cut keep_none() { return {~0ull, 0}; }
};

// Counts keys by their leading bits once, then answers order statistics.
template <class Bits>
class KeyRanks {
 public:
  KeyRanks(const Bits* keys, int64_t size) : keys_(keys), size_(size), bins_(kBins) {
    for (int64_t i = 0; i < size; ++i) ++bins_[size_t(keys[i] >> kShift)];
  }

  // The key of 1-based `rank` in descending order, and how many keys are larger.
  Bits nth_largest(int64_t rank, int64_t* larger) const {
    int64_t above = 0;
    size_t bin = kBins - 1;
    while (above + int64_t(bins_[bin]) < rank) above += bins_[bin--];
    std::vector<Bits> inside;
    inside.reserve(size_t(bins_[bin]));
    for (int64_t i = 0; i < size_; ++i)
      if (size_t(keys_[i] >> kShift) == bin) inside.push_back(keys_[i]);
    const auto nth = inside.begin() + (rank - above - 1);
    std::nth_element(inside.begin(), nth, inside.end(), std::greater<Bits>());
    const Bits key = *nth;
    *larger = above + std::count_if(inside.begin(), inside.end(), [key](Bits b) { return b > key; });
    return key;
  }

  // Position in the array of the `nth` (1-based) key equal to `key`.
  int64_t nth_equal(Bits key, int64_t nth) const {
    for (int64_t i = 0; i < size_; ++i)
      if (keys_[i] == key && --nth == 0) return i;
    return size_;
  }

 private:
  static constexpr int kShift = sizeof(Bits) * 8 - 14;  // the sign bit is clear: 13 bits, 32 KiB of counters
  static constexpr size_t kBins = 8192;
  const Bits* keys_;
  int64_t size_;
  std::vector<uint32_t> bins_;
};

}  // namespace pm
