// Combine: from sums to the merged value (TIES-Merging, section 3, step 3), each operation rounded once.
#pragma once
#include "dtype.h"

namespace pm {

template <class V>
PM_HD V combine_mean(V sum, V weights) {
  return sum / select(is_zero(weights), V::set(1), weights);
}

// Rescale: what gives a trimmed task vector its sum of magnitudes back, `all` of them over those `kept`
// (mergekit 0.1.5); 1 where nothing is trimmed (`whole`) or next to nothing is there.
template <class Work>
PM_HD Work rescale_factor(bool whole, double all, double kept) {
  return whole || all < 1e-7 || kept < 1e-7 ? Work(1) : Work(all / kept);
}

// What methods that do not elect divide by: the sum of the weights, but beside a base not by next to nothing.
template <class Work>
PM_HD Work combine_divisor(bool base, Work weights) {
  const bool tiny = weights > Work(-1e-8) && weights < Work(1e-8);
  return base && tiny ? Work(1) : weights;
}

template <class V>
PM_HD V combine_base(V base, V lambda, V merged) {
  return base + lambda * merged;
}

// A kept NaN (or opposite infinities) makes the mass NaN, and then the result is NaN.
template <class V>
PM_HD V combine_nan(V result, V mass) {
  return select(is_nan(mass), mass, result);
}

// The merged task vector from what trim and elect left: `mass` sums all kept entries, `sum` and `weights`
// those that agree with the elected sign. Methods that do not elect divide the mass by one divisor for all
// elements.
template <bool kElect, class V>
PM_HD V combine_entries(V mass, V sum, V weights, V divisor, bool normalize) {
  const V merged = kElect ? sum : mass;
  if (!normalize) return merged;
  return kElect ? combine_mean(merged, weights) : merged / divisor;
}

// The result from the merged task vector.
template <bool kBase, bool kElect, class V>
PM_HD V combine_result(V base, V merged, V mass, V lambda) {
  if (kBase) merged = combine_base(base, lambda, merged);
  return kElect ? combine_nan(merged, mass) : merged;
}

template <bool kBase, bool kElect, class V>
PM_HD V combine(V base, V mass, V sum, V weights, V lambda, V divisor, bool normalize) {
  const V merged = combine_entries<kElect>(mass, sum, weights, divisor, normalize);
  return combine_result<kBase, kElect>(base, merged, mass, lambda);
}

}  // namespace pm
