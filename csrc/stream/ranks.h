// Ranked random trim of one row: an entry's random word against a limit that depends on its rank.
#pragma once
#include <span>
#include <vector>

#include "../core/rank.h"

namespace pm {

// Ranks go by magnitude; of equal ones the lowest index has the highest rank. Buffers are kept from row to
// row.
template <class Bits>
class RowRanks {
 public:
  RowRanks(double density, double epsilon) : density_(density), epsilon_(epsilon) {}

  // The limits of the smallest and the largest entry of a row of `size`.
  uint32_t lowest(int64_t size) const { return limit(0, size - 1); }
  uint32_t highest(int64_t size) const { return limit(size - 1, size - 1); }

  // For the entries [begin, end) of a row with these keys: sets bit `to` + i of `bits` where words[i] is
  // below its limit, for every i whose bit in `open` is set; i counts from `begin`.
  void decide(std::span<const Bits> keys, int64_t begin, int64_t end, const uint32_t* words,
              const uint64_t* open, uint64_t* bits, int64_t to);

 private:
  static constexpr int kMostBits = 11;  // of a bin's number
  static constexpr int kOctaves = 16;   // below the largest key; what is smaller shares the first bin

  uint32_t limit(int64_t rank, int64_t last) const {
    return random_limit(ranked_density(density_, epsilon_, rank, last));
  }
  void count_bins(std::span<const Bits> keys);
  // Decides the doubtful entries by their exact ranks.
  void sort_out(std::span<const Bits> keys, int64_t begin, const uint32_t* words, uint64_t* bits, int64_t to);

  struct Bin {
    int64_t seen;  // of its keys, from the row's end
    Bits key;
    bool mixed;  // not all its keys are equal
  };
  double density_, epsilon_;
  std::vector<uint16_t> bin_;       // of each key
  std::vector<int32_t> start_;      // how many keys lie in lower bins
  std::vector<uint64_t> doubtful_;  // entries whose word lies between the limits of their bin, as `bits`
  std::vector<uint8_t> flagged_;    // bins that hold such
  std::vector<Bin> bins_;           // what is known of these
  std::vector<int32_t> chosen_;     // their entries
};

}  // namespace pm
