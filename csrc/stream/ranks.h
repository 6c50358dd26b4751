// Ranked random trim of one row: an entry's random word against a limit that depends on its rank.
#pragma once
#include <span>
#include <vector>

#include "../core/rank.h"
#include "../cpu/kernels.h"

namespace pm {

// Ranks go by magnitude; of equal ones the lowest index has the highest rank. Buffers are kept from row to
// row.
template <class Work>
class RowRanks {
 public:
  using Bits = typename WorkTraits<Work>::Bits;

  // For rows of `size` entries.
  RowRanks(const KernelSet<Work>& kernels, double density, double epsilon, int64_t size);

  // The limits of the smallest and the largest entry of a row.
  uint32_t lowest() const { return lowest_; }
  uint32_t highest() const { return highest_; }

  // For the entries [begin, end) of a row with these keys, of which `most` is the largest: sets bit `to` + i
  // of `bits` where words[i] is below its limit, for every i whose bit in `open` is set, which says that
  // the word lies in [lowest, highest); i counts from `begin`.
  void decide(std::span<const Bits> keys, Bits most, int64_t begin, int64_t end, const uint32_t* words,
              const uint64_t* open, uint64_t* bits, int64_t to);

 private:
  using Entry = std::conditional_t<sizeof(Bits) == 4, uint64_t, unsigned __int128>;

  uint32_t limit(int64_t rank) const { return random_limit(ranked_density(density_, epsilon_, rank, last_)); }
  // The rank whose limit a word is, to within the margin.
  int64_t rank_of(uint32_t word) const { return int64_t(uint64_t(word - lowest_) * ranks_per_word_ >> 32); }
  void count_bins(std::span<const Bits> keys, Bits most);
  void count_seen();
  Entry entry(std::span<const Bits> keys, size_t at) const {
    return Entry(keys[at]) << 32 | uint32_t(~uint32_t(at));
  }
  // Decides those left over by sorting all that lie in their bins.
  void sort_out(std::span<const Bits> keys, int64_t begin, const uint32_t* words, uint64_t* bits, int64_t to);

  const KernelSet<Work>& kernels_;
  double density_, epsilon_;
  int64_t last_, half_;  // the largest rank; where the second half of a row starts
  uint32_t lowest_, highest_;
  uint64_t ranks_per_word_ = 0;  // times 2^32
  int64_t margin_ = 0;           // ranks by which a word's may be off
  int bin_bits_, shift_;
  std::vector<uint16_t> bin_;   // of each key
  std::vector<uint8_t> loose_;  // entries whose bin does not tell their key
  // The rank of the last key of each bin in the first half of the row, and in the second.
  std::vector<int32_t> front_, start_;
  std::vector<int32_t> seen_;     // keys of the same bin further on in that half
  std::vector<int32_t> slack_;    // by how much the sum of both may be off, and the rank of a word
  std::vector<int32_t> left_;     // entries still to be decided, in bins of several keys
  std::vector<uint8_t> flagged_;  // bins that hold such
  std::vector<Entry> entries_;    // all that lie in those: keys, of equal ones the last first
};

}  // namespace pm
