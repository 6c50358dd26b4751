// The map kernel: trim, elect and combine in one sweep over the inputs, each of them read once.
//
// A thread holds one vector of elements and goes through the experts. It keeps the sums of both signs, so
// that no entry has to be kept or read again once the sign is elected, and any number of experts runs.
#pragma once
#include "load.h"

namespace pm::cuda {

// What a kernel is compiled for.
template <class T, bool kBase, Trim kTrim, bool kElect, bool kUnit, Collect kCollect = Collect::no>
struct Shape {
  using Type = T;
  static constexpr bool base = kBase;
  static constexpr Trim trim = kTrim;
  static constexpr bool elect = kElect;
  static constexpr bool unit = kUnit;  // every weight and scale is 1, late weights too
  static constexpr Collect collect = kCollect;
  static constexpr bool collecting = kCollect != Collect::no;
};

struct MapCall {
  Group group;
  Rule rule;
  State state;
  Rounds rounds;
  int round;
  bool own_cuts;  // each tensor has its own thresholds
  bool scaled;
  const int* only_if;  // run only if this is set; null: always

  __device__ const Cut& cut(int64_t tensor, int k) const {
    return own_cuts ? state.cuts[tensor * group.experts + k] : state.expert[k].cut;
  }
  __device__ const Cut& drop(int64_t tensor, int k) const {
    return own_cuts ? state.drops[tensor * group.experts + k] : state.expert[k].drop;
  }
};

// What the threads of a block share about their piece.
struct Shared {
  Piece piece;
  bool single;  // element by element: not aligned to vectors, or some threshold changes within the piece
  uint32_t keep_at[kMaxExperts], open_at[kMaxExperts], count_at[kMaxExperts], drop_at[kMaxExperts];
  unsigned int above[kMaxExperts];          // with all ties: strictly above the bracket
  uint16_t counted[kMaxExperts][kThreads];  // what each thread has kept
};

// Both signs' sums of the kept entries of one element: the one that the mass elects is the result's.
template <bool kUnit>
struct Sides {
  Lane sum[2], weight[2];
  __device__ void clear() { sum[0] = sum[1] = weight[0] = weight[1] = Lane::set(0); }
  __device__ void add(bool keep, Lane entry, Lane w, Lane late) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool agree = keep && is_positive(s ? Lane{-entry.x} : entry);
      sum[s] = add_where(agree, sum[s], entry * late);
      weight[s] = add_where(agree, weight[s], w);
    }
  }
  __device__ Lane weights(bool minus) const { return select(minus, weight[1], weight[0]); }
};

// Where every weight is 1 the weights are counts, and both fit one register.
template <>
struct Sides<true> {
  Lane sum[2];
  uint32_t counts;
  __device__ void clear() {
    sum[0] = sum[1] = Lane::set(0);
    counts = 0;
  }
  __device__ void add(bool keep, Lane entry, Lane, Lane) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (keep && is_positive(s ? Lane{-entry.x} : entry)) {
        sum[s] = sum[s] + entry;
        counts += s ? 1u << 16 : 1u;
      }
  }
  __device__ Lane weights(bool minus) const { return {float(minus ? counts >> 16 : counts & 0xffff)}; }
};

// What one thread does, `kCount` elements at a time. One at a time, each looks up its own thresholds; else
// those of the whole piece are taken.
template <class S, int kCount>
class Mapper {
  using T = typename S::Type;
  using Raw = typename T::Raw;
  static constexpr bool kSingle = kCount == 1;
  static constexpr int kAhead = 4;  // experts whose loads are on their way

 public:
  __device__ Mapper(const MapCall& call, const Piece& piece, Shared* shared)
      : c_(call), s_(shared), piece_(piece) {}

  // Elements [begin, end) of the piece, a multiple of kCount. All threads of the block take part to the end.
  __device__ void sweep(int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += kThreads * kCount) {
      const int64_t at = start + int64_t(threadIdx.x) * kCount;
      vector(at, at < end);
    }
  }

  __device__ void vector(int64_t at, bool active) {
    Lane base[kCount], mass[kCount], result[kCount];
    Sides<S::unit> sides[kCount];
    Stored<T, kCount> ahead[kAhead], stored;
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (j < c_.group.experts) ahead[j].load(input(kExperts + j, at), active);
    if constexpr (S::base) {
      stored.load(input(kBase, at), active);
      stored.widened(base);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      mass[e] = Lane::set(0);
      if constexpr (S::elect) sides[e].clear();
    }
    for (int k = 0; k < c_.group.experts; k += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j >= c_.group.experts) break;
        Lane d[kCount];
        ahead[j].widened(d);
        if (k + j + kAhead < c_.group.experts) ahead[j].load(input(kExperts + k + j + kAhead, at), active);
        add_expert(k + j, at, base, d, mass, sides);
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      Lane sum = mass[e], weights = Lane::set(0);
      if constexpr (S::elect) {
        const bool minus = bit_cast<uint32_t>(elect(mass[e]).x) != 0;
        sum = select(minus, sides[e].sum[1], sides[e].sum[0]);
        weights = sides[e].weights(minus);
      }
      result[e] = combine<S::base, S::elect>(base[e], mass[e], sum, weights, Lane::set(c_.rule.lambda),
                                             Lane::set(c_.rule.divisor), c_.rule.normalize);
    }
    stored.narrowed(result);
    stored.store(piece_.template out<Raw>() + at, active);
    if constexpr (S::collecting) append_open(at, active);
  }

 private:
  __device__ const Raw* input(int column, int64_t at) const {
    return piece_.template input<Raw>(column) + at;
  }

  __device__ void add_expert(int k, int64_t at, const Lane (&base)[kCount], Lane (&d)[kCount],
                             Lane (&mass)[kCount], Sides<S::unit> (&sides)[kCount]) {
    bool keep[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if constexpr (S::base) d[e] = d[e] - base[e];
    trim(k, at, d, keep);
    if constexpr (S::collecting) collect(k, at, d, keep);
    const Lane weight = S::unit ? Lane::set(1) : Lane::set(c_.rule.weight[k]);
    const Lane late = S::unit ? Lane::set(1) : Lane::set(c_.rule.late[k]);
    const Lane scale = S::base && c_.scaled ? Lane::set(scale_of(k)) : Lane::set(1);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      Lane v = d[e];
      if constexpr (!S::unit) v = (S::base ? v * scale : v) * weight;
      mass[e] = add_where(keep[e], mass[e], v);
      if constexpr (S::elect) sides[e].add(keep[e], v, weight, late);
    }
  }

  __device__ float scale_of(int k) const { return c_.state.scale[piece_.tensor * c_.group.experts + k]; }
  // One element at a time there may be nothing that is shared.
  using OfPiece = uint32_t (Shared::*)[kMaxExperts];
  __device__ uint32_t at_element(const Cut& cut, OfPiece of_piece, int k, int64_t at) const {
    return kSingle ? threshold_at<float>(cut, piece_.flat + uint64_t(at)) : (s_->*of_piece)[k];
  }

  __device__ void trim(int k, int64_t at, const Lane (&d)[kCount], bool (&keep)[kCount]) {
    if constexpr (by_magnitude(S::trim)) {
      const Cut& cut = S::collecting ? c_.state.expert[k].high : c_.cut(piece_.tensor, k);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        keep[e] = trim_magnitude(d[e], at_element(cut, &Shared::keep_at, k, at + e));
      if constexpr (S::trim == Trim::outliers) drop_outliers(k, at, d, keep);
    } else if (S::trim == Trim::random && !c_.rule.whole[k]) {
      random_keep(uint64_t(piece_.first + at), k, uint64_t(piece_.row[kKey]), c_.rule.limit[k], keep);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) keep[e] = true;
    }
  }

  __device__ void drop_outliers(int k, int64_t at, const Lane (&d)[kCount], bool (&keep)[kCount]) {
    const Cut& drop = c_.drop(piece_.tensor, k);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      keep[e] = trim_outliers(keep[e], trim_magnitude(d[e], at_element(drop, &Shared::drop_at, k, at + e)));
  }

  // Counts what is kept, and notes whether something is open: below the bracket's top, not below its bottom.
  // Threads past the end hold zeros, which lie below every bracket.
  __device__ void collect(int k, int64_t at, const Lane (&d)[kCount], const bool (&keep)[kCount]) {
    int kept = 0, above = 0;
    bool open = false;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (keep[e]) ++kept;
      if constexpr (S::collect == Collect::all)
        if (trim_magnitude(d[e], s_->count_at[k])) ++above;
      open |= is_open(k, at + e, d[e]);
    }
    s_->counted[k][threadIdx.x] += uint16_t(kept);
    if constexpr (S::collect == Collect::all) {
      const unsigned warp_above = __reduce_add_sync(~0u, unsigned(above));
      if (threadIdx.x % 32 == 0 && warp_above) atomicAdd(&s_->above[k], warp_above);
    }
    if (open) open_experts_ |= uint64_t(1) << k;
  }

  __device__ bool is_open(int k, int64_t at, Lane d) const {
    const Expert& expert = c_.state.expert[k];
    const uint32_t low = at_element(expert.low, &Shared::open_at, k, at);
    return magnitude(d) - low < at_element(expert.high, &Shared::keep_at, k, at) - low;
  }

  // Appends the open entries of the experts that have any in this warp; those few are read once more, which
  // keeps the loop over all experts short.
  __device__ void append_open(int64_t at, bool active) {
    uint64_t experts = uint64_t(__reduce_or_sync(~0u, unsigned(open_experts_ >> 32))) << 32 |
                       __reduce_or_sync(~0u, unsigned(open_experts_));
    open_experts_ = 0;
    while (experts) {
      const int k = __ffsll((long long)experts) - 1;
      experts &= experts - 1;
      Stored<T, kCount> stored;
      Lane base[kCount], d[kCount];
      bool open[kCount];
      stored.load(input(kBase, at), active);
      stored.widened(base);
      stored.load(input(kExperts + k, at), active);
      stored.widened(d);
      for (int e = 0; e < kCount; ++e) {
        d[e] = d[e] - base[e];
        open[e] = is_open(k, at + e, d[e]);
      }
      append(k, at, d, open);
    }
  }

  __device__ void append(int k, int64_t at, const Lane (&d)[kCount], const bool (&open)[kCount]) {
    const int lane = int(threadIdx.x % 32);
    int mine = 0;
    for (int e = 0; e < kCount; ++e) mine += open[e];
    int before = mine;  // of the lanes up to this one
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(~0u, before, unsigned(step));
      if (lane >= step) before += lower;
    }
    unsigned long long start = 0;
    if (lane == 31) start = atomicAdd(&c_.state.expert[k].listed, (unsigned long long)before);
    start = __shfl_sync(~0u, start, 31);
    int64_t place = int64_t(start) + before - mine;
    const int64_t list = k * c_.state.capacity;
    for (int e = 0; e < kCount; ++e) {
      if (!open[e]) continue;
      if (place < c_.state.capacity) {
        const uint32_t key = magnitude(d[e]), nan = WorkTraits<float>::nan_key;
        c_.state.list_magnitude[list + place] = key < nan ? key : nan;
        c_.state.list_index[list + place] = piece_.flat + uint64_t(at + e);
      }
      ++place;
    }
  }

  const MapCall& c_;
  Shared* s_;
  const Piece piece_;
  uint64_t open_experts_ = 0;  // bit k: this thread holds an open entry of expert k
};

// Thread k prepares expert k's thresholds for the piece that thread 0 has found.
template <class S>
__device__ inline void prepare_expert(const MapCall& c, Shared& s, int k) {
  const Expert& expert = c.state.expert[k];
  const Cut& keep = S::collecting ? expert.high : c.cut(s.piece.tensor, k);
  const auto inside = [&s](const Cut& cut) {
    return cut.index > s.piece.flat && cut.index < s.piece.flat + uint64_t(s.piece.count);
  };
  if constexpr (by_magnitude(S::trim)) {
    s.keep_at[k] = threshold_at<float>(keep, s.piece.flat);
    if (inside(keep)) s.single = true;
  }
  if constexpr (S::trim == Trim::outliers) {
    const Cut& drop = c.drop(s.piece.tensor, k);
    s.drop_at[k] = threshold_at<float>(drop, s.piece.flat);
    if (inside(drop)) s.single = true;
  }
  if constexpr (S::collecting) {
    s.open_at[k] = threshold_at<float>(expert.low, s.piece.flat);
    s.count_at[k] = above<float>(expert.high.magnitude);
    s.above[k] = 0;
    if (inside(expert.low)) s.single = true;
  }
}

// Adds what the block has counted for expert k to the totals, and to the stratum that `place` lies in.
template <class S>
__device__ inline void note_counts(const MapCall& c, const Shared& s, int64_t place, int k) {
  unsigned long long kept = 0;
  for (int thread = 0; thread < kThreads; ++thread) kept += s.counted[k][thread];
  Expert& expert = c.state.expert[k];
  const bool all = S::collect == Collect::all;
  atomicAdd(&expert.above, all ? (unsigned long long)s.above[k] : kept);
  if (all) atomicAdd(&expert.kept, kept);
  const int64_t places = c.rounds.places(c.round), strata = places < kStrata ? places : kStrata;
  unsigned long long* stratum = c.state.tally + (place * strata / places) * (1 + c.group.experts);
  atomicAdd(&stratum[1 + k], kept);
  if (k == 0) {
    atomicAdd(&stratum[0], (unsigned long long)s.piece.count);
    atomicAdd(c.state.seen, (unsigned long long)s.piece.count);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) map_pieces(const __grid_constant__ MapCall c) {
  __shared__ Shared s;
  if (c.only_if && !*c.only_if) return;
  const int thread = int(threadIdx.x);
  for (int64_t place = blockIdx.x; place < c.rounds.places(c.round); place += gridDim.x) {
    const int64_t number = c.rounds.piece(c.round, place);
    if (number >= c.group.pieces) continue;  // the same for the whole block
    __syncthreads();                         // the last piece's shared values are done with
    if (thread == 0) {
      s.piece = find_piece(c.group, number);
      uint64_t addresses = uint64_t(s.piece.row[kOut]) | (S::base ? uint64_t(s.piece.row[kBase]) : 0);
      for (int k = 0; k < c.group.experts; ++k) addresses |= uint64_t(s.piece.row[kExperts + k]);
      s.single = addresses % 16 != 0;
    }
    __syncthreads();
    if (thread < c.group.experts) prepare_expert<S>(c, s, thread);
    if constexpr (S::collecting)
      for (int k = 0; k < c.group.experts; ++k) s.counted[k][thread] = 0;
    __syncthreads();
    constexpr int kCount = kVector<typename S::Type>;
    const int64_t end = s.piece.count, vectors = s.single ? 0 : end / kCount * kCount;
    Mapper<S, kCount>(c, s.piece, &s).sweep(0, vectors);
    Mapper<S, 1>(c, s.piece, &s).sweep(vectors, end);
    if constexpr (S::collecting) {
      __syncthreads();
      if (thread < c.group.experts) note_counts<S>(c, s, place, thread);
    }
  }
}

// The undecided once more, now with the exact cuts: an expert's list tells where, and the inputs are read
// again there. Where several experts are undecided the same result is written several times.
template <class S>
__global__ void __launch_bounds__(kThreads) fix_up(const __grid_constant__ MapCall c) {
  if (*c.state.missed) return;
  const int expert = int(blockIdx.y);
  const int64_t listed = int64_t(c.state.expert[expert].listed);
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < listed;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t flat = int64_t(c.state.list_index[expert * c.state.capacity + i]);
    const int64_t tensor = c.group.last_at(kOrigin, flat);
    const int64_t* row = c.group.row(tensor);
    const Piece element{row, tensor, flat - row[kOrigin], 1, uint64_t(flat)};
    Mapper<S, 1>(c, element, nullptr).vector(0, true);
  }
}

}  // namespace pm::cuda
