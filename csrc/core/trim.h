// Trim: which entries of a task vector take part (TIES-Merging, section 3, step 1; DARE, section 3).
#pragma once
#include "philox.h"

namespace pm {

// Magnitudes order like the unsigned integers of their bits; NaN lies above infinity.
template <class V>
PM_HD typename V::Mask trim_magnitude(V d, typename V::Bits threshold) {
  return at_least(magnitude(d), threshold);
}

// Of what reaches the threshold the outliers are dropped; each of them reaches it (Davari and Belilovsky,
// "Model Breadcrumbs", 2023, section 3).
template <class Mask>
PM_HD Mask trim_outliers(Mask reaches, Mask outlier) {
  return Mask(reaches ^ outlier);
}

// How many of `size` entries a density keeps: -1 for all, else int(density * size), but at least one unless
// the density is zero. With `one_more` int(density * size) + 1, as the TIES authors' code keeps.
PM_HD int64_t kept_entries(double density, int64_t size, bool one_more = false) {
  if (density >= 1) return -1;
  if (density <= 0 || size == 0) return 0;
  const int64_t kept = int64_t(density * double(size)) + one_more;
  return kept < 1 ? 1 : kept > size ? size : kept;
}

// At random: words below this are kept.
PM_HD uint32_t random_limit(double density) {
  return density >= 1 ? ~0u : uint32_t((density > 0 ? density : 0) * 0x1p32);
}

// With outliers: the largest `dropped` entries are outliers, the others of the largest `reached` are kept
// (-1: all others). Where both shares together are more than all, fewer are outliers.
struct OutlierRanks {
  int64_t dropped, reached;
};
PM_HD OutlierRanks outlier_ranks(double density, double gamma, int64_t size) {
  if (density >= 1) return {0, -1};
  const int64_t kept = density <= 0 ? 0 : int64_t(density * double(size));
  if (kept == 0) return {0, 0};
  const int64_t outliers = int64_t(gamma * double(size)), spare = size - kept;
  return outliers < spare ? OutlierRanks{outliers, outliers + kept} : OutlierRanks{spare, -1};
}

}  // namespace pm
