// The one parameter block that every map kernel takes, on every kind of hardware.
#pragma once
#include "dtype.h"

namespace pm {

enum class Trim : int { none = 0, magnitude = 1, random = 2, outliers = 3 };

// Whether a trim goes by thresholds, which have to be searched for.
PM_HD constexpr bool by_magnitude(Trim trim) { return trim == Trim::magnitude || trim == Trim::outliers; }

// What the coefficients of a linear map are computed from the inputs' Gram matrix as.
enum class Blend : int { none = 0, slerp = 1, nuslerp = 2, multislerp = 3, karcher = 4, model_stock = 5 };

// What one Gram matrix is taken over: the whole tensor, each row (last axis), or each column (first axis).
enum class Vectors : int { tensor = 0, rows = 1, columns = 2 };

struct Blending {
  Blend kind = Blend::none;
  Vectors vectors = Vectors::tensor;
  double t = 0, eps = 0, tol = 0;
  int max_iter = 0;
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
  const Work* scale = nullptr;      // factor on the trimmed task vector (rescale), 1 if none
  Work lambda = 1;                  // on the merged task vector; unused without a base
  Work divisor = 1;                 // non-electing methods: the sum of the weights, or 1
  bool normalize = false;           // electing methods: divide by the weights of the agreeing experts
  const uint32_t* limit = nullptr;  // random trim: keep where the random word is below; 2^32 - 1 and
  const uint8_t* whole = nullptr;   // ... `whole` set: keep everything
  uint32_t key0 = 0, key1 = 0;      // random trim: from the seed and the tensor's name
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
  uint64_t index = 0;  // flat index of the first element, a multiple of 4 (random trim)
  int cuts = 0;        // masses only: how many thresholds, one for each expert or two
  const Bits* keep_at = nullptr;
  const Bits* open_at = nullptr;   // Collect: entries in [open_at, keep_at) are undecided
  const Bits* count_at = nullptr;  // Collect: entries at or above are counted in `above`
  int64_t* above = nullptr;
  int64_t* kept = nullptr;        // Collect::all: how many are at or above keep_at
  uint64_t* undecided = nullptr;  // Collect: a zeroed bitmap; positions undecided for any expert are set
  bool bypass_cache = false;      // the output is large and will not be read soon
};

}  // namespace pm
