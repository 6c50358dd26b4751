// A group of tensors on the device, and what a merge keeps about it there.
#pragma once
#include "../core/bracket.h"
#include "../core/cut.h"
#include "../core/params.h"
#include "../core/rounds.h"
#include "../core/trim.h"
#include "platform.h"

namespace pm::cuda {

constexpr int kMaxExperts = 64;
#if defined(PM_THREADS)
constexpr int kThreads = PM_THREADS;  // fewer where threads are fibers
#else
constexpr int kThreads = 256;
#endif
constexpr int64_t kReduceBlock = 65536;  // as on the processor: sums are the same bits
constexpr int kVirtualLanes = 16;

// Columns of the table of tensors; each row goes on with the addresses of its experts.
enum Column { kCount, kOrigin, kFirstPiece, kFirstBlock, kKey, kBase, kOut, kExperts };

// The tensors that one threshold per expert is taken over, or many tensors with thresholds of their own.
struct Group {
  const int64_t* table = nullptr;  // device memory, [tensors][kExperts + experts]
  int64_t tensors = 0;
  int64_t size = 0;   // elements
  int64_t piece = 0;  // elements a block takes at a time, none across tensors
  int64_t pieces = 0;
  int64_t blocks = 0;  // of at most kReduceBlock elements
  int experts = 0;

  PM_HD const int64_t* row(int64_t tensor) const { return table + tensor * (kExperts + experts); }
  // The last tensor whose `column` is at most `value`.
  PM_HD int64_t last_at(Column column, int64_t value) const {
    int64_t low = 0, high = tensors;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (row(middle)[column] <= value ? low : high) = middle;
    }
    return low;
  }
};

struct Piece {
  const int64_t* row;
  int64_t tensor, first, count;
  uint64_t flat;  // of the first element

  template <class Raw>
  PM_HD const Raw* input(int column) const {
    return reinterpret_cast<const Raw*>(row[column]) + first;
  }
  template <class Raw>
  PM_HD Raw* out() const {
    return reinterpret_cast<Raw*>(row[kOut]) + first;
  }
};

PM_HD Piece piece_of(const Group& group, int64_t tensor, int64_t number, int64_t size) {
  const int64_t* row = group.row(tensor);
  const int64_t first = number * size, left = row[kCount] - first;
  return {row, tensor, first, left < size ? left : size, uint64_t(row[kOrigin] + first)};
}

PM_HD Piece find_piece(const Group& group, int64_t number) {
  const int64_t tensor = group.last_at(kFirstPiece, number);
  return piece_of(group, tensor, number - group.row(tensor)[kFirstPiece], group.piece);
}

// The rule as kernels take it: by value.
struct Rule {
  float weight[kMaxExperts];
  float late[kMaxExperts];  // factor on what agrees, which does not vote
  double density[kMaxExperts], gamma[kMaxExperts];
  uint32_t limit[kMaxExperts];
  bool whole[kMaxExperts];
  float lambda, divisor;
  bool normalize, all_ties, outliers;

  // How many of `size` entries of expert k reach its threshold (-1: all), and how many are its outliers.
  PM_HD OutlierRanks ranks(int k, int64_t size) const {
    if (outliers) return outlier_ranks(density[k], gamma[k], size);
    return {0, kept_entries(density[k], size)};
  }
};

// A search for the `rank`-th largest key of one expert, ties by lower flat index first.
struct Search {
  enum Stage : int { idle, magnitude, index, done };
  int stage;
  int64_t rank;           // within the range
  int64_t larger, equal;  // keys above the magnitude found, keys equal to it
  int64_t passed;         // ranks passed over: all that come before the range
  uint64_t low, high;     // the range: of magnitudes, then of indices
  uint64_t last_index;
  Cut cut;

  PM_HD static Search over(uint64_t low, uint64_t high, int64_t rank, int64_t last_index) {
    const uint64_t nan = WorkTraits<float>::nan_key;
    return {magnitude, rank, 0, 0, 0, low, high < nan ? high : nan, uint64_t(last_index), {}};
  }
  PM_HD static Search over_all(int64_t rank, int64_t last_index) { return over(0, ~0ull, rank, last_index); }
  PM_HD Placed placed() const { return {cut, passed + rank, larger, equal}; }
};

constexpr int64_t kStrata = 256;  // of a round: how the kept share varies between them bounds the error

// What one group's merge keeps in device memory, all of it written by kernels.
struct Expert {
  Cut low, high;  // the bracket: kept under `high` is kept for certain, not kept under `low` trimmed
  Cut cut, drop;  // the result: what reaches `cut` is kept, but for the outliers, which reach `drop`
  unsigned long long above, kept;  // as the stream counted them under the bracket; `kept` with all ties only
  unsigned long long listed;       // undecided entries appended so far
  unsigned long long counted;      // of these, counted in `opened` already
  int64_t opened;                  // undecided under the bracket as it is now
  Search search[2];                // the bracket's low and high end; or `cut` and `drop`
};

struct State {
  Expert* expert;             // [experts]
  unsigned long long* bins;   // [experts][2][kBins]
  unsigned int* ticket;       // [experts][2]
  unsigned long long* tally;  // [kStrata][1 + experts]: elements; what is surely kept
  unsigned long long* seen;   // elements streamed
  int* missed;                // the bracket or the list failed: the exact route must be taken
  uint32_t* sample;           // [experts][samples] magnitudes
  uint32_t* list_magnitude;   // [experts][capacity]
  uint64_t* list_index;       // [experts][capacity]
  double* masses;             // [blocks][experts][2]
  float* scale;               // [tensors][experts]
  Cut *cuts, *drops;          // [tensors][experts], for thresholds of their own
  int64_t samples, capacity;
};

}  // namespace pm::cuda
