// Trim: which entries of a task vector take part (TIES-Merging, section 3, step 1; DARE, section 3).
#pragma once
#include "philox.h"

namespace pm {

// Magnitudes order like the unsigned integers of their bits; NaN lies above infinity.
template <class V>
PM_HD typename V::Mask trim_magnitude(V d, typename V::Bits threshold) {
  return at_least(magnitude(d), threshold);
}

}  // namespace pm
