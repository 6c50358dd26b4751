// Merges one group: exact thresholds and the output in one reading of the inputs (Crew = who does the work).
#pragma once
#include "../core/blend.h"
#include "../core/bracket.h"
#include "bracket.h"
#include "tensor_params.h"

namespace pm {

template <class Work>
void merge_group(Group<Work>& group, Crew& crew);

// Merges groups over the same inputs, read alike, in one reading: their cuts (if any) are known, and nothing
// is rescaled.
template <class Work>
void map_together(const std::vector<Group<Work>*>& groups, Crew& crew);

// Merges tensors whose trim is made as masks, or whose entries fuse by a formula of their own, one by one.
template <class Work>
void masked_group(const Group<Work>& group, Crew& crew);

// Merges one tensor by a blend: the Gram matrix of its inputs first, then a linear map.
template <class Work>
void blend_group(const Group<Work>& group, Crew& crew);

// The same where every column is a vector of its own.
template <class Work>
void blend_columns(const Group<Work>& group, Crew& crew);

// The coefficients of one vector; StreamError where there are none.
template <class Work>
Coefficients group_coefficients(const Group<Work>& group, const Gram& gram);

// The exact place of every cut by counting passes over the inputs; needs no luck and little memory.
template <class Work>
std::vector<Cut> exact_cuts(const Group<Work>& group, Crew& crew);

// All inputs of a group that is whole; the tile lasts until the crew's last worker loads another one.
template <class Work>
Tile load_whole(const Group<Work>& group, Crew& crew);

// The exact cuts of a group that is whole, from its tile.
template <class Work>
std::vector<Cut> whole_cuts(const Group<Work>& group, const Tile& tile, Crew& crew);

// The exact cuts of groups over the same inputs, which trim alike but for their ranks: one reading for each
// expert, or one for all where groups are whole. Not for small groups of several tensors.
template <class Work>
std::vector<std::vector<Cut>> search_cuts(const std::vector<const Group<Work>*>& groups, Crew& crew);

// What one streaming pass counted, per cut.
struct Counts {
  std::vector<int64_t> above, kept, opened;
  explicit Counts(int cuts) : above(size_t(cuts)), kept(size_t(cuts)), opened(size_t(cuts)) {}
  void add(const Counts& more) {
    for (size_t k = 0; k < above.size(); ++k)
      above[k] += more.above[k], kept[k] += more.kept[k], opened[k] += more.opened[k];
  }
  CutCounts at(size_t k) const { return {above[k], kept[k], opened[k]}; }
  void set(size_t k, const CutCounts& c) { above[k] = c.above, kept[k] = c.kept, opened[k] = c.opened; }
  void clear() {
    for (auto* counts : {&above, &kept, &opened}) std::fill(counts->begin(), counts->end(), 0);
  }
};

// The exact place of every cut from the undecided; false if a bracket missed its threshold.
template <class Work>
bool select_cuts(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Bracket& bracket,
                 const Counts& counts, std::vector<Cut>* cuts);

// Maps the undecided again, now with the exact cuts, and replaces their results.
template <class Work>
void fix_up(const Group<Work>& group, Crew& crew, UndecidedStore& store, const std::vector<Cut>& cuts,
            const std::vector<TensorParams<Work>>& params);

// Sets each tensor's factors in `params`: one more reading of the inputs.
template <class Work>
void rescale(const Group<Work>& group, Crew& crew, const std::vector<Cut>& cuts,
             std::vector<TensorParams<Work>>* params);

}  // namespace pm
