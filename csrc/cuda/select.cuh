// Select: exact order statistics of keys on the device, by narrowing a range to one of its bins at a time.
#pragma once
#include "load.h"

namespace pm::cuda {

constexpr int kBins = 2048;
constexpr int kMagnitudePasses = 3;  // 31 bits of magnitude, 11 settled by each pass

inline int index_passes(int64_t size) {
  int passes = 1;
  while (size >> (11 * passes)) ++passes;
  return passes;
}

PM_HD int bin_shift(const Search& s) {
  int shift = 0;
  while ((s.high - s.low) >> shift >= uint64_t(kBins)) ++shift;
  return shift;
}

// Enters the bin that holds the rank; a range of one value is an answer. Bin b of `bins` counts keys from
// low + (b << shift). With all ties the magnitude is all that is asked for.
__device__ inline void enter_bin(Search& s, int bin, int64_t passed, int64_t count, bool all_ties) {
  const uint64_t step = uint64_t(1) << bin_shift(s), top = s.high;
  s.rank -= passed, s.passed += passed;
  s.low += uint64_t(bin) * step;
  s.high = s.low + step - 1 < top ? s.low + step - 1 : top;
  if (s.low != s.high) return;
  if (s.stage == Search::magnitude) {
    s.cut = {s.low, Cut::kAllIndices};
    s.larger = s.passed, s.equal = count;
    s.stage = all_ties ? Search::done : Search::index;
    s.low = 0, s.high = s.last_index;
  } else {
    s.cut.index = s.low + 1;
    s.stage = Search::done;
  }
}

// Finds the bin of the rank among `bins` (magnitudes count from the top, indices from the bottom), with all
// of a block's threads. Returns false if the bins hold fewer keys than the rank.
__device__ inline bool find_bin(Search& s, const unsigned long long* bins, bool all_ties) {
  __shared__ unsigned long long part[kThreads];
  constexpr int kEach = kBins / kThreads;
  const bool from_top = s.stage == Search::magnitude;
  const auto bin_at = [from_top](int place) { return from_top ? kBins - 1 - place : place; };
  unsigned long long sum = 0;
  for (int i = 0; i < kEach; ++i) sum += bins[bin_at(int(threadIdx.x) * kEach + i)];
  part[threadIdx.x] = sum;
  __syncthreads();
  bool found = true;
  if (threadIdx.x == 0) {
    int64_t passed = 0;
    int thread = 0;
    while (thread < kThreads && passed + int64_t(part[thread]) < s.rank) passed += int64_t(part[thread++]);
    found = thread < kThreads;
    if (found) {
      int place = thread * kEach;
      while (passed + int64_t(bins[bin_at(place)]) < s.rank) passed += int64_t(bins[bin_at(place++)]);
      enter_bin(s, bin_at(place), passed, int64_t(bins[bin_at(place)]), all_ties);
    }
  }
  __syncthreads();
  return found;
}

// Adds a key to the bins of a search if it lies in the search's range.
__device__ inline void count_key(const Search& s, int shift, uint32_t key, uint64_t index,
                                 unsigned int* bins) {
  const bool by_index = s.stage == Search::index;
  if (by_index && key != s.cut.magnitude) return;
  const uint64_t value = by_index ? index : key;
  if (value >= s.low && value <= s.high) atomicAdd(&bins[(value - s.low) >> shift], 1u);
}

// Where keys come from. Each has: each(expert, body(key, index)), shared out among the blocks of a launch.

struct FromSample {
  State state;
  int64_t size, stratum;
  static constexpr int64_t kCluster = 32;  // neighbours that are sampled together: one load of a warp

  PM_HD int64_t clusters() const { return state.samples / kCluster; }
  PM_HD uint64_t index(int64_t sample) const {
    const int64_t cluster = sample / kCluster, room = stratum - kCluster + 1;
    return uint64_t(cluster * stratum) + scatter(uint64_t(cluster)) % uint64_t(room) +
           uint64_t(sample % kCluster);
  }
  template <class F>
  __device__ void each(int expert, F&& body) const {
    for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < state.samples;
         i += int64_t(gridDim.x) * kThreads)
      body(state.sample[expert * state.samples + i], index(i));
  }
};

struct FromList {
  State state;
  template <class F>
  __device__ void each(int expert, F&& body) const {
    const Expert& e = state.expert[expert];
    const int64_t listed = int64_t(e.listed), size = listed < state.capacity ? listed : state.capacity;
    for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < size;
         i += int64_t(gridDim.x) * kThreads) {
      const uint32_t key = state.list_magnitude[expert * state.capacity + i];
      const uint64_t index = state.list_index[expert * state.capacity + i];
      if (reaches(e.low, key, index) && !reaches(e.high, key, index)) body(key, index);
    }
  }
};

template <class T>
struct FromInputs {
  Group group;
  template <class F>
  __device__ void each(int expert, F&& body) const {
    for (int64_t number = blockIdx.x; number < group.pieces; number += gridDim.x)
      each_of(find_piece(group, number), expert, body);
  }
  template <class F>
  __device__ static void each_of(const Piece& piece, int expert, F&& body) {
    for (int64_t i = threadIdx.x; i < piece.count; i += kThreads)
      body(key_of<T>(piece.row, expert, piece.first + i), piece.flat + uint64_t(i));
  }
};

// One pass of every search: count bins, and the last block to finish enters the bin of the rank.
template <class Source>
__global__ void __launch_bounds__(kThreads) narrow_searches(Source source, State state, bool all_ties) {
  __shared__ unsigned int bins[kBins];
  __shared__ bool last;
  const int expert = int(blockIdx.y / 2), slot = int(blockIdx.y);
  Search& search = state.expert[expert].search[slot % 2];
  if (search.stage != Search::magnitude && search.stage != Search::index) return;
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Search s = search;
  const int shift = bin_shift(s);
  source.each(expert, [&](uint32_t key, uint64_t index) { count_key(s, shift, key, index, bins); });
  __syncthreads();
  unsigned long long* total = state.bins + int64_t(slot) * kBins;
  for (int i = int(threadIdx.x); i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&total[i], (unsigned long long)bins[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&state.ticket[slot], 1u) + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (!find_bin(search, total, all_ties) && threadIdx.x == 0) {
    search.stage = Search::idle;  // fewer keys than were counted: nothing that follows may rely on them
    *state.missed = 1;
  }
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) total[i] = 0;
  if (threadIdx.x == 0) state.ticket[slot] = 0;
}

// Thresholds of many small tensors at once: a block finds one expert's in one tensor, or its outliers'.
template <class T>
__global__ void __launch_bounds__(kThreads) find_small_cuts(Group group, Rule rule, State state) {
  __shared__ unsigned int bins[kBins];
  __shared__ unsigned long long total[kBins];
  __shared__ Search search;
  const int64_t tensor = blockIdx.x;
  const int expert = int(blockIdx.y) % group.experts;
  const bool outliers = int(blockIdx.y) >= group.experts;
  const Piece piece = piece_of(group, tensor, 0, group.row(tensor)[kCount]);
  const OutlierRanks ranks = rule.ranks(expert, piece.count);
  const int64_t rank = outliers ? ranks.dropped : ranks.reached;
  Cut& cut = (outliers ? state.drops : state.cuts)[tensor * group.experts + expert];
  if (rank <= 0) {
    if (threadIdx.x == 0) cut = rank < 0 ? Cut::keep_all() : Cut::keep_none();
    return;
  }
  if (threadIdx.x == 0) search = Search::over_all(rank, piece.count - 1);
  __syncthreads();
  while (search.stage != Search::done) {
    for (int i = int(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    const int shift = bin_shift(search);
    FromInputs<T>::each_of(piece, expert, [&](uint32_t key, uint64_t index) {
      count_key(search, shift, key, index - piece.flat, bins);
    });
    __syncthreads();
    for (int i = int(threadIdx.x); i < kBins; i += kThreads) total[i] = bins[i];
    __syncthreads();
    find_bin(search, total, rule.all_ties);
    __syncthreads();
  }
  if (threadIdx.x == 0)
    cut = {search.cut.magnitude, rule.all_ties ? Cut::kAllIndices : search.cut.index + piece.flat};
}

}  // namespace pm::cuda
