// Merges one group: exact thresholds and the output in one reading of the inputs (Crew = who does the work).
#pragma once
#include "bracket.h"

namespace pm {

template <class Work>
void merge_group(Group<Work>& group, Crew& crew);

// The exact cut of every searched expert by counting passes over the inputs; needs no luck and little memory.
template <class Work>
std::vector<Cut> exact_cuts(const Group<Work>& group, Crew& crew);

// What one streaming pass counted, per expert.
struct Counts {
  std::vector<int64_t> above, kept, opened;
  explicit Counts(int experts) : above(size_t(experts)), kept(size_t(experts)), opened(size_t(experts)) {}
};

// The exact cut of every searched expert from the undecided; false if a bracket missed its threshold.
template <class Work>
bool select_cuts(const Group<Work>& group, Crew& crew, UndecidedStore& store, const Bracket& bracket,
                 const Counts& counts, std::vector<Cut>* cuts);

}  // namespace pm
