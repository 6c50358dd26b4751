// Scores of one tensor's elements, and the cut that divides them: what a trim keeps for all experts alike.
#pragma once
#include "digits.h"
#include "tensor_params.h"

namespace pm {

template <class Work>
class Scores {
 public:
  using Bits = typename WorkTraits<Work>::Bits;

  // Finds the cut: two or three readings of the inputs, or one if there is memory for the scores.
  Scores(const Group<Work>& group, const JobView& view, Crew& crew);

  const Cut& cut() const { return cut_; }
  // The magnitude bits of the scores of [first, first + count), with room for a group more; `at`: where they
  // start in the loaded tile.
  const Bits* keys(Worker& worker, int64_t at, int64_t first, int64_t count) const;

 private:
  void make(Worker& worker, int64_t at, int64_t first, int64_t count, Bits* to) const;
  void weigh_rows(Crew& crew);
  Work row_divergence(Worker& worker, int64_t start, int64_t width) const;
  Cut cut_by_variance(Crew& crew);
  Cut cut_by_importance(Crew& crew);
  std::span<const Bits> piece_keys(int member, int64_t piece) const;

  const Group<Work>& group_;
  RunContext& run_;
  const JobView& view_;
  int64_t tile_, pieces_;
  std::vector<Work> row_;  // importance: the factor of each row
  Bits* kept_ = nullptr;   // the scores, if there is memory for them
  bool made_ = false;      // whether they are there
  Cut cut_ = Cut::keep_all();
};

}  // namespace pm
