// The map kernel: trim, elect and combine in one sweep over the inputs, each of them read once.
//
// A thread holds one vector of elements and goes through the experts. It keeps the sums of both signs, so that
// no entry has to be kept or read again once the sign is elected, and any number of experts runs.
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
  static constexpr bool unit = kUnit;  // every weight and scale is 1
  static constexpr Collect collect = kCollect;
  static constexpr bool collecting = kCollect != Collect::no;
};

struct MapCall {
  Group group;
  Rule rule;
  State state;
  Rounds rounds;
  int round;
  bool own_cuts;         // each tensor has its own thresholds
  bool scaled;
  const int* only_if;    // run only if this is set; null: always
};

// What the threads of a block share about their piece.
struct Shared {
  Piece piece;
  bool aligned, split;  // split: some threshold changes within the piece
  uint32_t keep_at[kMaxExperts], open_at[kMaxExperts], count_at[kMaxExperts];
  unsigned int above[kMaxExperts], kept[kMaxExperts];
};

// Both signs' sums of the entries of one element: the one that the mass elects is the result's.
struct Sides {
  Lane sum[2], weight[2];
  __device__ void clear() { sum[0] = sum[1] = weight[0] = weight[1] = Lane::set(0); }
  __device__ void add(Lane entry, Lane w) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const bool agree = agrees(entry, Lane::set(s ? -0.0f : 0.0f));
      sum[s] = add_where(agree, sum[s], entry);
      weight[s] = add_where(agree, weight[s], w);
    }
  }
};

// What one thread does: `kCount` elements at a time.
template <class S, int kCount>
class Mapper {
  using T = typename S::Type;
  using Raw = typename T::Raw;

 public:
  __device__ Mapper(const MapCall& call, const Piece& piece, Shared* shared)
      : c_(call), s_(shared), piece_(piece), aligned_(shared && shared->aligned) {}

  template <bool kSplit>
  __device__ void sweep() {
    for (int64_t start = 0; start < piece_.count; start += kThreads * kCount) {
      const int64_t at = start + int64_t(threadIdx.x) * kCount, left = piece_.count - at;
      vector<kSplit>(at, left < 0 ? 0 : left < kCount ? int(left) : kCount);
    }
  }

  // With kSplit each element looks up its own thresholds, else the piece's are taken.
  template <bool kSplit>
  __device__ void vector(int64_t at, int count) {
    Lane base[kCount], mass[kCount], result[kCount];
    Sides sides[kCount];
    if constexpr (S::base) load<T>(piece_.template input<Raw>(kBase), at, count, aligned_, base);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      mass[e] = Lane::set(0);
      if constexpr (S::elect) sides[e].clear();
    }
#pragma unroll 4
    for (int k = 0; k < c_.group.experts; ++k) {
      Lane d[kCount];
      bool keep[kCount];
      load<T>(piece_.template input<Raw>(kExperts + k), at, count, aligned_, d);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        if constexpr (S::base) d[e] = d[e] - base[e];
      trim<kSplit>(k, at, d, keep);
      if constexpr (S::collecting) collect<kSplit>(k, at, count, d, keep);
      const Lane weight = S::unit ? Lane::set(1) : Lane::set(c_.rule.weight[k]);
      const Lane scale = S::base && c_.scaled ? Lane::set(scale_of(k)) : Lane::set(1);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        Lane v = d[e];
        if constexpr (!S::unit) v = (S::base ? v * scale : v) * weight;
        if constexpr (S::trim != Trim::none) v = keep_where(keep[e], v);
        mass[e] = mass[e] + v;
        if constexpr (S::elect) sides[e].add(v, weight);
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      Lane sum = mass[e], weights = Lane::set(0);
      if constexpr (S::elect) {
        const bool minus = bit_cast<uint32_t>(elect(mass[e]).x) != 0;
        sum = select(minus, sides[e].sum[1], sides[e].sum[0]);
        weights = select(minus, sides[e].weight[1], sides[e].weight[0]);
      }
      result[e] = combine<S::base, S::elect>(base[e], mass[e], sum, weights, Lane::set(c_.rule.lambda),
                                             Lane::set(c_.rule.divisor), c_.rule.normalize);
    }
    store<T>(piece_.template out<Raw>(), at, count, aligned_, result);
  }

 private:

  __device__ float scale_of(int k) const { return c_.state.scale[piece_.tensor * c_.group.experts + k]; }
  __device__ const Cut& cut(int k) const {
    return c_.own_cuts ? c_.state.cuts[piece_.tensor * c_.group.experts + k] : c_.state.expert[k].cut;
  }
  template <bool kSplit>
  __device__ uint32_t at_element(const Cut& cut, const uint32_t* whole_piece, int64_t at) const {
    return kSplit ? threshold_at<float>(cut, piece_.flat + uint64_t(at)) : *whole_piece;
  }

  template <bool kSplit>
  __device__ void trim(int k, int64_t at, const Lane (&d)[kCount], bool (&keep)[kCount]) {
    if constexpr (S::trim == Trim::magnitude) {
      const Cut& cut = S::collecting ? c_.state.expert[k].high : this->cut(k);
#pragma unroll
      for (int e = 0; e < kCount; ++e)
        keep[e] = trim_magnitude(d[e], at_element<kSplit>(cut, &s_->keep_at[k], at + e));
    } else if (S::trim == Trim::random && !c_.rule.whole[k]) {
      const uint64_t index = uint64_t(piece_.first + at);
      random_vector(index, k, uint64_t(piece_.row[kKey]), c_.rule.limit[k], keep);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) keep[e] = true;
    }
  }

  // Counts what is kept; appends what is open: below the bracket's top, not below its bottom.
  template <bool kSplit>
  __device__ void collect(int k, int64_t at, int count, const Lane (&d)[kCount], const bool (&keep)[kCount]) {
    const Cut& low = c_.state.expert[k].low;
    int kept = 0, above = 0, mine = 0;
    bool open[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const bool here = e < count;
      open[e] = here && trim_magnitude(d[e], at_element<kSplit>(low, &s_->open_at[k], at + e));
      kept += here && keep[e];
      if constexpr (S::collect == Collect::all) above += here && trim_magnitude(d[e], s_->count_at[k]);
      open[e] = open[e] && !keep[e];
      mine += open[e];
    }
    if constexpr (S::collect == Collect::first) above = kept;
    const int lane = int(threadIdx.x % 32);
    const unsigned warp_above = __reduce_add_sync(~0u, unsigned(above));
    if (lane == 0 && warp_above) atomicAdd(&s_->above[k], warp_above);
    if constexpr (S::collect == Collect::all) {
      const unsigned warp_kept = __reduce_add_sync(~0u, unsigned(kept));
      if (lane == 0 && warp_kept) atomicAdd(&s_->kept[k], warp_kept);
    }
    if (__any_sync(~0u, mine)) append(k, at, mine, d, open);
  }

  __device__ void append(int k, int64_t at, int mine, const Lane (&d)[kCount], const bool (&open)[kCount]) {
    const int lane = int(threadIdx.x % 32);
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
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (open[e]) {
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
  const bool aligned_;
};

// Thread k prepares expert k's thresholds for the piece that thread 0 has found.
template <class S>
__device__ inline void prepare_expert(const MapCall& c, Shared& s, int k) {
  const Expert& expert = c.state.expert[k];
  const int64_t tensor = s.piece.tensor;
  const Cut& cut = c.own_cuts ? c.state.cuts[tensor * c.group.experts + k] : expert.cut;
  const Cut& keep = S::collecting ? expert.high : cut;
  const auto inside = [&s](const Cut& cut) {
    return cut.index > s.piece.flat && cut.index < s.piece.flat + uint64_t(s.piece.count);
  };
  if constexpr (S::trim == Trim::magnitude) {
    s.keep_at[k] = threshold_at<float>(keep, s.piece.flat);
    if (inside(keep)) s.split = true;
  }
  if constexpr (S::collecting) {
    s.open_at[k] = threshold_at<float>(expert.low, s.piece.flat);
    s.count_at[k] = above<float>(expert.high.magnitude);
    s.above[k] = s.kept[k] = 0;
    if (inside(expert.low)) s.split = true;
  }
}

template <class S>
__device__ inline void note_counts(const MapCall& c, const Shared& s, int64_t place, int k) {
  Expert& expert = c.state.expert[k];
  atomicAdd(&expert.above, (unsigned long long)s.above[k]);
  if (S::collect == Collect::all) atomicAdd(&expert.kept, (unsigned long long)s.kept[k]);
  const int64_t places = c.rounds.places(c.round), strata = places < kStrata ? places : kStrata;
  unsigned long long* stratum = c.state.tally + (place * strata / places) * (1 + c.group.experts);
  atomicAdd(&stratum[1 + k], (unsigned long long)(S::collect == Collect::all ? s.kept[k] : s.above[k]));
  if (k == 0) {
    atomicAdd(&stratum[0], (unsigned long long)s.piece.count);
    atomicAdd(c.state.seen, (unsigned long long)s.piece.count);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) map_pieces(const __grid_constant__ MapCall c) {
  __shared__ Shared s;
  if (c.only_if && !*c.only_if) return;
  const int thread = int(threadIdx.x);
  for (int64_t place = blockIdx.x; place < c.rounds.places(c.round); place += gridDim.x) {
    const int64_t number = c.rounds.piece(c.round, place);
    if (number >= c.group.pieces) continue;  // the same for the whole block
    __syncthreads();                         // the last piece's shared values are done with
    if (thread == 0) {
      s.piece = find_piece(c.group, number);
      s.split = false;
      uint64_t addresses = uint64_t(s.piece.row[kOut]) | (S::base ? uint64_t(s.piece.row[kBase]) : 0);
      for (int k = 0; k < c.group.experts; ++k) addresses |= uint64_t(s.piece.row[kExperts + k]);
      s.aligned = addresses % 16 == 0;
    }
    __syncthreads();
    if (thread < c.group.experts) prepare_expert<S>(c, s, thread);
    __syncthreads();
    Mapper<S, kVector<typename S::Type>> mapper(c, s.piece, &s);
    if (S::trim == Trim::magnitude && s.split)
      mapper.template sweep<true>();
    else
      mapper.template sweep<false>();
    if constexpr (S::collecting) {
      __syncthreads();
      if (thread < c.group.experts) note_counts<S>(c, s, place, thread);
    }
  }
}

// The undecided once more, now with the exact cuts: an expert's list tells where, and the inputs are read again
// there. Where several experts are undecided the same result is written several times.
template <class S>
__global__ void __launch_bounds__(kThreads) fix_up(const __grid_constant__ MapCall c) {
  if (*c.state.missed) return;
  const int expert = int(blockIdx.y);
  const int64_t listed = int64_t(c.state.expert[expert].listed);
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < listed; i += int64_t(gridDim.x) * kThreads) {
    const int64_t flat = int64_t(c.state.list_index[expert * c.state.capacity + i]);
    const int64_t tensor = c.group.last_at(kOrigin, flat);
    const int64_t* row = c.group.row(tensor);
    const Piece element{row, tensor, flat - row[kOrigin], 1, uint64_t(flat)};
    Mapper<S, 1>(c, element, nullptr).template vector<true>(0, 1);
  }
}

}  // namespace pm::cuda
