// Bracket: around each expert's threshold, first from a sample, then from what has been streamed; at the end
// the counts prove it or have the exact route taken. The steps between the passes run on the device, so that
// the host never waits.
#pragma once
#include "select.cuh"

namespace pm::cuda {

struct BracketCall {
  Group group;
  Rule rule;
  State state;
  double sigmas, bias;  // half width in standard errors; a shift of the ranks, with which tests force a miss
};

// The magnitudes of the sample: a warp reads one cluster of neighbours from every input.
template <class T>
static __global__ void __launch_bounds__(kThreads) sample_keys(Group group, FromSample sample) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= sample.state.samples) return;
  const int64_t flat = int64_t(sample.index(i));
  const int64_t* row = group.row(group.last_at(kOrigin, flat));
  for (int k = 0; k < group.experts; ++k)
    sample.state.sample[k * sample.state.samples + i] = key_of<T>(row, k, flat - row[kOrigin]);
}

// Thread k: how many entries of expert k reach its threshold.
__device__ inline int64_t wanted_of(const BracketCall& c, int k) {
  return c.rule.ranks(k, c.group.size).reached;
}

__device__ inline void search_nothing(Expert& expert) {
  expert.search[0].stage = expert.search[1].stage = Search::idle;
}

// First the middle of each bracket is searched for in the sample.
static __global__ void aim_middle(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const int64_t wanted = wanted_of(c, k), samples = c.state.samples;
  search_nothing(expert);
  expert.low = expert.high = expert.cut = wanted < 0 ? Cut::keep_all() : Cut::keep_none();
  if (wanted <= 0) return;
  double rank = (double(wanted) / double(c.group.size) + c.bias) * double(samples);
  rank = rank < 1 ? 1 : rank > double(samples) ? double(samples) : rank;
  expert.search[0] = Search::over_all(int64_t(rank), c.group.size - 1);
}

// Then its ends, four standard errors away. One block per expert.
static __global__ void __launch_bounds__(kThreads) aim_ends(BracketCall c, FromSample sample) {
  __shared__ unsigned long long squares;
  const int k = int(blockIdx.x);
  Expert& expert = c.state.expert[k];
  if (expert.search[0].stage != Search::done) return;
  if (threadIdx.x == 0) squares = 0;
  __syncthreads();
  const Cut middle = expert.search[0].cut;
  const auto reached = [&](int64_t cluster) {
    int count = 0;
    for (int64_t i = cluster * FromSample::kCluster; i < (cluster + 1) * FromSample::kCluster; ++i)
      count += reaches(middle, c.state.sample[k * c.state.samples + i], sample.index(i));
    return count;
  };
  unsigned long long mine = 0;
  for (int64_t cluster = threadIdx.x; cluster + 1 < sample.clusters(); cluster += kThreads) {
    const int step = reached(cluster + 1) - reached(cluster);
    mine += (unsigned long long)(step * step);
  }
  atomicAdd(&squares, mine);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double error = count_error(double(squares), double(sample.clusters()));
  const Ends ends = ends_around(double(expert.search[0].placed().rank), c.sigmas * error + 1);
  const int64_t last = c.group.size - 1;
  expert.low = Cut::keep_all();
  expert.high = Cut::keep_none();
  search_nothing(expert);
  if (ends.low <= double(c.state.samples)) expert.search[0] = Search::over_all(int64_t(ends.low), last);
  if (ends.high >= 1) expert.search[1] = Search::over_all(int64_t(ends.high), last);
}

// The bracket as the sample gives it; the stream counts from here.
static __global__ void open_bracket(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  if (wanted_of(c, k) <= 0) return;
  const bool all_ties = c.rule.all_ties;
  const Search &low = expert.search[0], &high = expert.search[1];
  if (low.stage == Search::done) expert.low = low.placed().end(all_ties);
  if (high.stage == Search::done) expert.high = high.placed().end(all_ties);
  expert.low = expert.low.without_zeros();
  expert.high = expert.high.without_zeros();
}

// Standard error of the kept share of expert k over the last round.
__device__ inline double tally_error(const BracketCall& c, int k) {
  ShareError shares;
  for (int64_t s = 0; s < kStrata; ++s) {
    const unsigned long long* stratum = c.state.tally + s * (1 + c.group.experts);
    if (!stratum[0]) continue;
    const double size = double(stratum[0]);
    shares.add(size, double(stratum[1 + k]) / size);
  }
  return shares.error();
}

// What has been counted under an expert's bracket; a list that had no room for all is a miss.
__device__ inline CutCounts take_stock(const BracketCall& c, Expert& expert) {
  expert.opened += int64_t(expert.listed - expert.counted);
  expert.counted = expert.listed;
  search_nothing(expert);
  if (int64_t(expert.listed) > c.state.capacity) *c.state.missed = 1;
  return {int64_t(expert.above), int64_t(expert.kept), expert.opened};
}

// After a round: where the ends must lie by what has been streamed so far.
static __global__ void aim_closer(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const CutCounts counts = take_stock(c, expert);
  const int64_t wanted = wanted_of(c, k);
  if (wanted <= 0 || *c.state.missed) return;
  const Ends ends = closer_ends(wanted, counts.surely_kept(c.rule.all_ties), int64_t(*c.state.seen),
                                c.group.size, tally_error(c, k), c.sigmas);
  const auto aim = [&](double rank, Search& search) {
    if (!moves(rank, counts.opened)) return;
    search = Search::over(expert.low.magnitude, expert.high.magnitude, int64_t(rank), c.group.size - 1);
  };
  aim(ends.low, expert.search[0]);
  aim(ends.high, expert.search[1]);
}

static __global__ void close_bracket(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const bool all_ties = c.rule.all_ties;
  const Search &low = expert.search[0], &high = expert.search[1];
  CutCounts counts{int64_t(expert.above), int64_t(expert.kept), expert.opened};
  if (low.stage == Search::done) {
    expert.low = low.placed().end(all_ties);
    move_low(low.placed(), all_ties, &counts);
  }
  if (high.stage == Search::done) {
    expert.high = high.placed().end(all_ties);
    move_high(high.placed(), all_ties, &counts);
  }
  expert.above = (unsigned long long)counts.above, expert.kept = (unsigned long long)counts.kept;
  expert.opened = counts.opened;
  for (int64_t s = k; s < kStrata; s += blockDim.x)
    for (int i = 0; i <= c.group.experts; ++i) c.state.tally[s * (1 + c.group.experts) + i] = 0;
}

// After the stream: reads the cut off the counts where they alone decide, searches where they do not, and
// finds out whether the bracket held.
static __global__ void judge(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const CutCounts counts = take_stock(c, expert);
  const int64_t wanted = wanted_of(c, k);
  if (wanted <= 0) return;
  const Verdict verdict = verdict_on(wanted, expert.low, expert.high, counts, c.rule.all_ties);
  expert.cut = verdict.cut;
  if (verdict.kind == Verdict::missed) *c.state.missed = 1;
  if (verdict.kind == Verdict::search)
    expert.search[0] =
        Search::over(expert.low.magnitude, expert.high.magnitude, verdict.rank, c.group.size - 1);
}

// The exact route, taken where the bracket failed: searches over everything.
static __global__ void aim_exactly(BracketCall c, bool always) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const OutlierRanks ranks = c.rule.ranks(k, c.group.size);
  expert.search[1].stage = Search::idle;
  if (!always && !*c.state.missed) return;
  const auto aim = [&](int64_t rank, Search& search, Cut& cut) {
    search.stage = Search::idle;
    cut = rank < 0 ? Cut::keep_all() : Cut::keep_none();
    if (rank > 0) search = Search::over_all(rank, c.group.size - 1);
  };
  aim(ranks.reached, expert.search[0], expert.cut);
  aim(ranks.dropped, expert.search[1], expert.drop);
}

static __global__ void settle_cuts(BracketCall c) {
  Expert& expert = c.state.expert[threadIdx.x];
  const auto settle = [&](const Search& search, Cut& cut) {
    if (search.stage == Search::done) cut = search.cut;
    if (c.rule.all_ties && cut.magnitude != Cut::keep_none().magnitude) cut.index = Cut::kAllIndices;
  };
  settle(expert.search[0], expert.cut);
  settle(expert.search[1], expert.drop);
}

}  // namespace pm::cuda
