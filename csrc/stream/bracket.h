// A bracket around each expert's threshold from a small sample of its task vector.
#pragma once
#include "group.h"

namespace pm {

// Entries kept under `high` are kept for certain, those not kept under `low` are trimmed; what lies between
// is undecided. Where nothing is searched for, both are the exact cut.
struct Bracket {
  std::vector<Cut> low, high;
};

// Places that are looked at first: clusters of `length` neighbours, one in each of equally long strata.
struct Samples {
  int64_t clusters, length;
  std::vector<uint64_t> start;  // flat index of each cluster, ascending
  int64_t size() const { return clusters * length; }
  uint64_t index(int64_t i) const { return start[size_t(i / length)] + uint64_t(i % length); }
};

// Of `size` elements, `most` at most; few of few: n^(2/3), where the sample's cost and that of what it leaves
// undecided balance.
Samples choose_samples(uint64_t size, int64_t length, int64_t most);

struct CutBracket {
  Cut low, high;
};

// The keys of samples, around whose ranks cuts are looked for.
template <class Bits>
class SampledKeys {
 public:
  SampledKeys(const Bits* keys, const Samples& samples, Buffer& memory);
  // Around the cut that this share of all elements reaches.
  CutBracket around(double share, double sigmas, bool all_ties);

 private:
  const Bits* keys_;
  const Samples& samples_;
  KeyRanking<Bits> ranking_;
};

template <class Work>
Bracket sample_bracket(const Group<Work>& group, Crew& crew);

}  // namespace pm
