// Cuts: where the kept entries of an expert end.
#pragma once
#include "dtype.h"

namespace pm {

// A cut divides keys, ordered by magnitude and then by lower flat index first: everything above `magnitude`
// is kept, and of what equals it, the indices below `index`.
struct Cut {
  uint64_t magnitude,
      index;  // no defaults: blocks of device threads share cuts in memory without constructors
  static constexpr uint64_t kAllIndices = ~0ull;

  PM_HD static Cut keep_all() { return {0, kAllIndices}; }
  PM_HD static Cut keep_none() { return {~0ull, 0}; }
  PM_HD static Cut keep_nonzero() { return {1, kAllIndices}; }
  PM_HD bool keeps_nonzero() const { return magnitude == 1 && index == kAllIndices; }
  // Zero task vectors never count, so no bracket needs to reach below the smallest magnitude.
  PM_HD Cut without_zeros() const { return magnitude == 0 ? keep_nonzero() : *this; }
};

// The lowest magnitude bits above `magnitude`, as raw bits: NaN are all equal, so nothing is above them. The
// sign bit alone is what no magnitude reaches; no threshold is larger.
template <class Work>
PM_HD typename WorkTraits<Work>::Bits above(uint64_t magnitude) {
  using Bits = typename WorkTraits<Work>::Bits;
  return magnitude >= WorkTraits<Work>::nan_key ? WorkTraits<Work>::sign : Bits(magnitude + 1);
}

// The threshold of a cut for flat index `at`: entries whose magnitude bits reach it are kept.
template <class Work>
PM_HD typename WorkTraits<Work>::Bits threshold_at(const Cut& cut, uint64_t at) {
  using Bits = typename WorkTraits<Work>::Bits;
  return at < cut.index ? Bits(cut.magnitude) : above<Work>(cut.magnitude);
}

}  // namespace pm
