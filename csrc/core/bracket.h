// Brackets: between which ranks a cut must lie by what was counted, and when the counts alone decide. No
// result depends on how wide a bracket is.
#pragma once
#include <cmath>

#include "cut.h"

namespace pm {

// By how much a standard error that was estimated from a few strata is widened: Student's t needs 1.4 times
// the normal's four sigmas at 16 degrees of freedom, 1.1 times at 64.
PM_HD double spread_margin(double strata) { return 1 + 8 / strata; }

// Standard error of a count; `squares`: summed over the steps from each stratum's part to the next one's.
// Elements near each other are alike, and so are strata, so only neighbours are compared.
PM_HD double count_error(double squares, double strata) {
  const double variance = squares / 2;
  return std::sqrt(variance > 1 ? variance : 1) * spread_margin(strata);
}

// Standard error of a share that is known for each stratum; strata of unequal size count as fewer.
class ShareError {
 public:
  PM_HD void add(double size, double share) {
    if (strata_++) steps_ += size * size * (share - last_) * (share - last_);
    total_ += size, squares_ += size * size, last_ = share;
  }
  PM_HD double error() const {
    return strata_ < 2 ? 1 : count_error(steps_, total_ * total_ / squares_) / total_;
  }

 private:
  double steps_ = 0, total_ = 0, squares_ = 0, last_ = 0;
  int strata_ = 0;
};

// The ranks of a bracket's ends, as numbers that may lie outside of what there is.
struct Ends {
  double low, high;
};
PM_HD Ends ends_around(double centre, double half) {
  return {std::ceil(centre + half), std::floor(centre - half)};
}

// What was counted under one cut's bracket. `above`: kept under its high end, but with all ties only what
// lies strictly above that end's magnitude, and `kept` is the whole. `opened`: undecided.
struct CutCounts {
  int64_t above, kept, opened;
  PM_HD int64_t surely_kept(bool all_ties) const { return all_ties ? kept : above; }
};

// Where the ends must lie among the undecided, when `seen` of `size` entries have been streamed and `wanted`
// of all reach the cut. `error`: of the share that reaches it.
PM_HD Ends closer_ends(int64_t wanted, int64_t surely_kept, int64_t seen, int64_t size, double error,
                       double sigmas) {
  const double share = double(seen) / double(size);
  const double half = sigmas * error * double(seen) * std::sqrt(1 - share) + 1;
  return ends_around(double(wanted) * share - double(surely_kept), half);
}
// An end does not move beyond what is undecided.
PM_HD bool moves(double rank, int64_t opened) { return rank >= 1 && rank < double(opened); }

// A key that was searched for among the undecided, and how these lie around it.
struct Placed {
  Cut cut;  // exactly `rank` undecided entries reach it
  int64_t rank = 0, larger = 0, equal = 0;

  // All ties of a magnitude share one fate, so with them the bracket's ends know no index.
  PM_HD Cut end(bool all_ties) const { return {cut.magnitude, all_ties ? Cut::kAllIndices : cut.index}; }
  PM_HD int64_t reaching(bool all_ties) const { return all_ties ? larger + equal : rank; }
};

// The counts under a bracket whose low end, or whose high end, has moved there; the low end moves first.
PM_HD void move_low(const Placed& to, bool all_ties, CutCounts* counts) {
  counts->opened = to.reaching(all_ties);
}
PM_HD void move_high(const Placed& to, bool all_ties, CutCounts* counts) {
  const int64_t reaching = to.reaching(all_ties);
  counts->opened -= reaching;
  counts->above = all_ties ? counts->kept + to.larger : counts->above + reaching;
  counts->kept += all_ties ? reaching : 0;
}

// What the counts of the whole stream say: the cut itself, the rank to search the undecided for, or that the
// bracket missed.
struct Verdict {
  enum Kind : int { decided, search, missed } kind;
  Cut cut;
  int64_t rank;
};
PM_HD Verdict verdict_on(int64_t wanted, const Cut& low, const Cut& high, const CutCounts& counts,
                         bool all_ties) {
  const Verdict missed{Verdict::missed, high, 0};
  if (all_ties) {  // the threshold may be the top of the bracket
    if (counts.above < wanted && wanted <= counts.kept) return {Verdict::decided, high, 0};
    if (counts.above >= wanted && counts.kept > 0) return missed;
  }
  const int64_t surely = counts.surely_kept(all_ties), most = surely + counts.opened;
  if (wanted < surely) return missed;
  if (wanted == surely) return {Verdict::decided, high, 0};
  if (wanted < most) return {Verdict::search, high, wanted - surely};
  return wanted == most || low.keeps_nonzero() ? Verdict{Verdict::decided, low, 0} : missed;
}

}  // namespace pm
