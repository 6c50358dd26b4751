// Trim: which entries of a task vector take part (TIES-Merging, section 3, step 1; DARE, section 3).
#pragma once
#include "philox.h"

namespace pm {

// Magnitudes order like the unsigned integers of their bits; NaN lies above infinity.
template <class V>
PM_HD typename V::Mask trim_magnitude(V d, typename V::Bits threshold) {
  return at_least(magnitude(d), threshold);
}

// A word below `limit` = floor(density * 2^32) keeps its element.
PM_HD constexpr bool trim_random(uint32_t word, uint32_t limit) { return word < limit; }

}  // namespace pm
