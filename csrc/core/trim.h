// Trim: which entries of a task vector take part (TIES-Merging, section 3, step 1; DARE, section 3).
#pragma once
#include "philox.h"

namespace pm {

// Magnitudes order like the unsigned integers of their bits; NaN lies above infinity.
template <class V>
PM_HD typename V::Mask trim_magnitude(V d, typename V::Bits threshold) {
  return at_least(magnitude(d), threshold);
}

// How many of `size` entries a density keeps: -1 for all, else int(density * size), but at least one unless
// the density is zero.
PM_HD int64_t kept_entries(double density, int64_t size) {
  if (density >= 1) return -1;
  if (density <= 0 || size == 0) return 0;
  const int64_t kept = int64_t(density * double(size));
  return kept < 1 ? 1 : kept;
}

}  // namespace pm
