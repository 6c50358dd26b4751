// Narrowing: what has been streamed so far is a larger sample than the first, so the bracket can close.
#pragma once
#include "merge.h"

namespace pm {

// How the kept share varies over a round: its pieces, in order, gathered into at most kBins strata.
class Tally {
 public:
  static constexpr int64_t kBins = 256;

  Tally(int cuts, int64_t places)
      : cuts_(size_t(cuts)), places_(places), size_(kBins), halves_(size_t(kBins) * cuts_) {}

  // Counts of the piece at `place`: the undecided count half, as the threshold will divide them somewhere.
  void add(int64_t place, int64_t size, const Counts& counts) {
    const size_t bin = size_t(place * std::min(kBins, places_) / places_);
    size_[bin] += size;
    for (size_t c = 0; c < cuts_; ++c)
      halves_[bin * cuts_ + c] += 2 * std::max(counts.above[c], counts.kept[c]) + counts.opened[c];
  }

  // Standard error of the share that reaches a cut, from the differences between neighbouring strata; already
  // widened for how few they are (strata of unequal size count as fewer).
  double error(int cut) const;

 private:
  size_t cuts_;
  int64_t places_;
  std::vector<std::atomic<int64_t>> size_, halves_;
};

// Sets the bracket to where the threshold must lie by what `seen` streamed elements show, never wider than it
// was, and `counts` to what they are under the new bracket.
template <class Work>
void narrow_bracket(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Tally& tally,
                    int64_t seen, Bracket* bracket, Counts* counts);

}  // namespace pm
