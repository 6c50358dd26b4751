// Fuse: the entries of one element become one by another formula than a weighted sum.
//
// Each is a struct with the state of one vector of elements: `take` sees the experts' task vectors d in their
// order (and the models x themselves), then, if `twice`, `again` sees them once more, after `turn`; `result`
// gives the merged values. pymerge/backends/fuse.py is the same in torch.
#pragma once
#include "combine.h"
#include "elect.h"
#include "params.h"

namespace pm {

constexpr int kFuses = 7;

// The larger of a number that is not negative and a positive constant; NaN stays.
template <class V>
PM_HD V at_least_value(V a, typename V::Work least) {
  using Bits = typename V::Bits;
  return select(at_least(magnitude(a), bit_cast<Bits>(least)), a, V::set(least));
}

// What those have in common that see the task vectors once.
template <class V>
struct FuseOnce {
  static constexpr bool twice = false;
  PM_HD void turn() {}
  PM_HD void again(V, int, const MapParams<typename V::Work>&) {}
};

// Swap in what is near: the nearer the other model, the more of it is taken (mergekit's nearswap).
template <class V>
struct FuseSwap : FuseOnce<V> {
  using Work = typename V::Work;
  V merged;
  PM_HD void begin() { merged = V::set(0); }
  PM_HD void take(V d, V base, V x, int, const MapParams<Work>& p) {
    const V share = V::set(p.t) / at_least_value(flip_sign(d, sign_bit(d)), Work(1e-6));
    const V positive = select(is_positive(share), share, V::set(0));
    const V most =
        select(at_least(magnitude(positive), bit_cast<typename V::Bits>(Work(1))), V::set(1), positive);
    merged = most * x + (V::set(1) - most) * base;
  }
  PM_HD V result(V, const MapParams<Work>&) const { return merged; }
};

// The mean of the entries past a threshold; one that stands alone goes whole, times its expert's factor
// ("RAM", reinforced agent merging, 2026).
template <class V>
struct FuseOverlap : FuseOnce<V> {
  using Work = typename V::Work;
  V sum, count, alone;
  PM_HD void begin() { sum = count = alone = V::set(0); }
  PM_HD void take(V d, V, V, int k, const MapParams<Work>& p) {
    const auto keep = overlaps(d, p);
    sum = add_where(keep, sum, d);
    count = add_where(keep, count, V::set(1));
    alone = add_where(keep, alone, d * V::set(p.weight[k]));
  }
  // Entries above the threshold t, not those equal to it.
  PM_HD static typename V::Mask overlaps(V d, const MapParams<Work>& p) {
    return at_least(magnitude(d), typename V::Bits(bit_cast<typename V::Bits>(p.t) + 1));
  }
  PM_HD V result(V base, const MapParams<Work>&) const {
    const auto shared = at_least(magnitude(count), bit_cast<typename V::Bits>(Work(2)));
    return base + select(shared, sum / select(shared, count, V::set(1)), alone);
  }
};

// The weighted mean of the entries that bear the sign of their unweighted sum (SCE, "FuseChat", 2024,
// section 3.3).
template <class V>
struct FuseEnergy {
  using Work = typename V::Work;
  static constexpr bool twice = true;
  V mass, side, sum, weights;
  PM_HD void begin() { mass = sum = weights = V::set(0); }
  PM_HD void take(V d, V, V, int, const MapParams<Work>&) { mass = mass + d; }
  PM_HD void turn() { side = elect(mass); }
  PM_HD void again(V d, int k, const MapParams<Work>& p) {
    const auto agree = agrees(d, side);
    const V weight = V::set(p.weight[k]);
    sum = add_where(agree, sum, d * weight);
    weights = add_where(agree, weights, weight);
  }
  PM_HD V result(V base, const MapParams<Work>&) const {
    return combine_nan(base + sum / at_least_value(weights, Work(1e-6)), mass);
  }
};

// The largest entry, of equal ones the first expert's ("MagMax", 2024, section 3.2).
template <class V>
struct FuseLargest : FuseOnce<V> {
  using Work = typename V::Work;
  V best;
  PM_HD void begin() { best = V::set(0); }
  PM_HD void take(V d, V, V, int k, const MapParams<Work>& p) {
    const V entry = d * V::set(p.weight[k]);
    best = select(larger(entry, best), entry, best);
  }
  PM_HD V result(V base, const MapParams<Work>& p) const {
    return combine_base(base, V::set(p.lambda), best);
  }
};

// The largest entry that bears the sign of the sum ("EMR-Merging", 2024, section 3.2: the unified task
// vector).
template <class V>
struct FuseElected {
  using Work = typename V::Work;
  static constexpr bool twice = true;
  V mass, side, best;
  PM_HD void begin() { mass = best = V::set(0); }
  PM_HD void take(V d, V, V, int k, const MapParams<Work>& p) { mass = mass + d * V::set(p.weight[k]); }
  PM_HD void turn() { side = elect(mass); }
  PM_HD void again(V d, int k, const MapParams<Work>& p) {
    const V entry = d * V::set(p.weight[k]), kept = keep_where(agrees(entry, side), entry);
    best = select(larger(kept, best), kept, best);
  }
  PM_HD V result(V base, const MapParams<Work>& p) const {
    return combine_nan(combine_base(base, V::set(p.lambda), best), mass);
  }
};

// The sum of the task vectors where enough experts claim it as their own: |d| >= t * |sum - d| (consensus
// merging, "Localizing Task Information for Improved Model Merging and Compression", 2024, sections 3 and 4).
template <class V>
struct FuseConsensus {
  using Work = typename V::Work;
  static constexpr bool twice = true;
  V mass, claims;
  PM_HD void begin() { mass = claims = V::set(0); }
  PM_HD void take(V d, V, V, int k, const MapParams<Work>& p) { mass = mass + d * V::set(p.weight[k]); }
  PM_HD void turn() {}
  PM_HD void again(V d, int k, const MapParams<Work>& p) {
    const V entry = d * V::set(p.weight[k]), others = (mass - entry) * V::set(p.t);
    claims = claims + select(larger(others, entry), V::set(0), V::set(1));
  }
  PM_HD V result(V base, const MapParams<Work>& p) const {
    const auto enough = at_least(magnitude(claims), bit_cast<typename V::Bits>(Work(p.votes)));
    return combine_nan(combine_base(base, V::set(p.lambda), keep_where(enough, mass)), mass);
  }
};

}  // namespace pm
