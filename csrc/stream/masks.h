// The masks of one tensor, a bit for each element and expert, where no threshold on magnitudes decides.
#pragma once
#include "ranks.h"
#include "scores.h"

namespace pm {

template <class Work>
class Masks {
 public:
  using Bits = typename WorkTraits<Work>::Bits;

  // Scores are found first where the trim goes by them.
  Masks(const Group<Work>& group, const JobView& view, Crew& crew);

  // How many elements to take at a time.
  int64_t step() const;

  // Loads the tile so that [first, first + count) starts `at` elements into it, and makes its masks, unless
  // they were kept: a bitmap from `first` on for each expert, null where all are kept. `first`: a multiple
  // of 64.
  struct Loaded {
    int64_t at;
    const uint64_t* const* mask;
  };
  Loaded load(Worker& worker, int64_t first, int64_t count);
  // Once all masks were made: those that were kept need not be made again.
  void all_made() { made_ = kept_ != nullptr; }

 private:
  void make_rows(Crew& crew);
  void draw(Worker& worker, int k, int64_t first, int64_t count, uint64_t* to) const;
  void draw_ranked(Worker& worker, int k, int64_t at, int64_t first, int64_t count, uint64_t* to) const;
  void compare(Worker& worker, int64_t at, int64_t first, int64_t count, uint64_t* to) const;
  bool whole(int k) const { return group_.rule().density[size_t(k)] >= 1; }
  bool ranked() const { return group_.rule().trim == Trim::ranked; }
  bool scored() const { return scores_ != nullptr; }
  // One mask for each expert, or one for all.
  int masks() const { return scored() ? 1 : group_.experts(); }
  const DrawKernels& kernels() const { return isa_kernels(run_.settings.isa).draw; }

  const Group<Work>& group_;
  RunContext& run_;
  const JobView& view_;
  std::unique_ptr<Scores<Work>> scores_;
  int64_t words_;             // 64-bit words of a bitmap over the tensor
  uint64_t* kept_ = nullptr;  // the bitmaps of the whole tensor, if there is memory for them
  bool made_ = false;
};

}  // namespace pm
