// A bracket around each expert's threshold from a small sample of its task vector.
#pragma once
#include "group.h"

namespace pm {

// Entries kept under `high` are kept for certain, those not kept under `low` are trimmed; what lies between
// is undecided. Where nothing is searched for, both are the exact cut.
struct Bracket {
  std::vector<Cut> low, high;
};

template <class Work>
Bracket sample_bracket(const Group<Work>& group, Crew& crew);

}  // namespace pm
