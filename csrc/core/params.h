// The one parameter block that every map kernel takes, on every kind of hardware.
#pragma once
#include "dtype.h"

namespace pm {

enum class Trim : int {
  none = 0,
  magnitude = 1,
  random = 2,
  outliers = 3,
  ranked = 4,      // at random, the less likely the smaller in its row
  variance = 5,    // where the experts differ most
  importance = 6,  // where the change is an outlier, weighed by how far its row's distribution moved
  given = 7,       // kernels only: as a mask says
};

// Whether a trim goes by thresholds on each expert's magnitudes, which have to be searched for.
PM_HD constexpr bool by_magnitude(Trim trim) { return trim == Trim::magnitude || trim == Trim::outliers; }
// Whether a trim is made as masks before the merge.
PM_HD constexpr bool by_mask(Trim trim) {
  return trim == Trim::random || (trim >= Trim::ranked && trim <= Trim::importance);
}

// How the entries of one element become one, where that is not a weighted sum: see fuse.h.
enum class Fuse : int {
  none = 0,
  swap = 1,
  overlap = 2,
  energy = 3,
  largest = 4,
  elected = 5,
  consensus = 6
};

// What the coefficients of a linear map are computed from the inputs' Gram matrix as.
enum class Blend : int { none = 0, slerp = 1, nuslerp = 2, multislerp = 3, karcher = 4, model_stock = 5 };

// What one Gram matrix is taken over: the whole tensor, each row (last axis), or each column (first axis).
enum class Vectors : int { tensor = 0, rows = 1, columns = 2 };

struct Blending {
  Blend kind = Blend::none;
  Vectors vectors = Vectors::tensor;
  double t = 0, eps = 0, tol = 0;
  int max_iter = 0;

  bool operator==(const Blending&) const = default;
};

// How a map kernel treats entries whose fate the bracket leaves open.
enum class Collect : int {
  no = 0,     // thresholds are final
  first = 1,  // counts what is kept, collects the undecided
  all = 2,    // as `first`, but counts only what lies strictly above the bracket's top
};

// Everything about one merge that is the same for all its elements. Arrays hold one entry per expert.
template <class Work>
struct MapParams {
  int experts = 0;
  const Work* weight = nullptr;
  const Work* scale = nullptr;  // factor on the trimmed task vector (rescale), 1 if none
  const Work* late = nullptr;   // electing methods: factor on what agrees, which does not vote; null: none
  Work lambda = 1;              // on the merged task vector; unused without a base
  Work divisor = 1;             // non-electing methods: the sum of the weights, or 1
  bool normalize = false;       // electing methods: divide by the weights of the agreeing experts
  Work t = 0;                   // fuse: the number of its formula
  int votes = 0;                // fuse consensus: how many experts must claim an entry
};

// A result that differs from a block's own in lambda alone.
template <class Work>
struct Further {
  Work lambda = 1;
  void* out = nullptr;
  bool bypass_cache = false;
  int64_t nan = 0;  // how many of its elements are NaN; the kernel adds them
};

// One block of elements. Thresholds are magnitude bits: an entry is kept where bits(|d|) >= keep_at. Where
// outliers are dropped, a second threshold for each expert follows after all the first.
template <class Work>
struct MapBlock {
  using Bits = typename WorkTraits<Work>::Bits;
  const void* base = nullptr;
  const void* const* expert = nullptr;
  void* out = nullptr;
  int64_t count = 0;
  int cuts = 0;                      // masses and search only: how many thresholds
  Further<Work>* further = nullptr;  // where there is a base; not with Collect, nor of fuses
  int furthers = 0;
  const uint64_t* const* mask =
      nullptr;  // given trim: a bit per element, for each expert; null: all are kept
  const Bits* keep_at = nullptr;
  const Bits* open_at = nullptr;   // Collect: entries in [open_at, keep_at) are undecided
  const Bits* count_at = nullptr;  // Collect: entries at or above are counted in `above`
  int64_t* above = nullptr;
  int64_t* kept = nullptr;        // Collect::all: how many are at or above keep_at
  uint64_t* undecided = nullptr;  // Collect: a zeroed bitmap; positions undecided for any expert are set
  bool bypass_cache = false;      // the output is large and will not be read soon
};

}  // namespace pm
