// A bracket around each expert's threshold from a small sample of its task vector.
#pragma once
#include "group.h"

namespace pm {

// Entries kept under `high` are kept for certain, those not kept under `low` are trimmed; what lies between
// is undecided. Where nothing is searched for, both are the exact cut.
struct Bracket {
  std::vector<Cut> low, high;
};

// By how much a standard error that was estimated from a few strata is widened: Student's t needs 1.4 times
// the normal's four sigmas at 16 degrees of freedom, 1.1 times at 64.
inline double spread_margin(double strata) { return 1 + 8 / strata; }

template <class Work>
Bracket sample_bracket(const Group<Work>& group, Crew& crew);

}  // namespace pm
