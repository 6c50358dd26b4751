// Bracket: around each expert's threshold, first from a sample, then from what has been streamed; at the end
// the counts prove it or have the exact route taken. The steps between the passes run on the device, so that
// the host never waits.
#pragma once
#include "select.cuh"

namespace pm::cuda {

// By how much a standard error that was estimated from a few strata is widened (Student's t).
PM_HD double spread_margin(int64_t strata) { return 1 + 8.0 / double(strata); }

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

// Thread k: what is kept of expert k.
__device__ inline int64_t kept_of(const BracketCall& c, int k) {
  return kept_entries(c.rule.density[k], c.group.size);
}

// First the middle of each bracket is searched for in the sample.
static __global__ void aim_middle(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const int64_t kept = kept_of(c, k), samples = c.state.samples;
  expert.search[0].stage = expert.search[1].stage = Search::idle;
  expert.low = expert.high = expert.cut = kept < 0 ? Cut::keep_all() : Cut::keep_none();
  if (kept <= 0) return;
  double rank = (double(kept) / double(c.group.size) + c.bias) * double(samples);
  rank = rank < 1 ? 1 : rank > double(samples) ? double(samples) : rank;
  expert.search[0] = Search::over_all(int64_t(rank), c.group.size - 1);
}

// Then its ends, four standard errors away. Neighbours are alike, and so are strata, so the error is
// estimated from how neighbouring clusters differ. One block per expert.
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
  const double variance = double(squares) / 2, samples = double(c.state.samples);
  const double half = c.sigmas * sqrt(variance > 1 ? variance : 1) * spread_margin(sample.clusters()) + 1;
  const int64_t last = c.group.size - 1;
  const double centre = double(expert.search[0].passed + expert.search[0].rank);
  const double low = ceil(centre + half), high = floor(centre - half);
  expert.low = Cut::keep_all();
  expert.high = Cut::keep_none();
  expert.search[0].stage = expert.search[1].stage = Search::idle;
  if (low <= samples) expert.search[0] = Search::over_all(int64_t(low), last);
  if (high >= 1) expert.search[1] = Search::over_all(int64_t(high), last);
}

__device__ inline Cut bracket_end(const BracketCall& c, const Cut& found) {
  // Zero task vectors never count, so no bracket needs to reach below the smallest magnitude.
  if (found.magnitude == 0) return {1, Cut::kAllIndices};
  return {found.magnitude, c.rule.all_ties ? Cut::kAllIndices : found.index};
}

// The bracket as the sample gives it; the stream counts from here.
static __global__ void open_bracket(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  if (kept_of(c, k) <= 0) return;
  if (expert.search[0].stage == Search::done) expert.low = expert.search[0].cut;
  if (expert.search[1].stage == Search::done) expert.high = expert.search[1].cut;
  expert.low = bracket_end(c, expert.low);
  expert.high = bracket_end(c, expert.high);
  if (expert.high.magnitude == ~0ull) expert.high = Cut::keep_none();
}

// Standard error of the kept share of expert k over the last round, from neighbouring strata.
__device__ inline double tally_error(const BracketCall& c, int k) {
  double variance = 0, total = 0, last = 0;
  int64_t strata = 0;
  for (int64_t s = 0; s < kStrata; ++s) {
    const unsigned long long* stratum = c.state.tally + s * (1 + c.group.experts);
    if (!stratum[0]) continue;
    const double size = double(stratum[0]), rate = double(stratum[1 + k]) / size;
    if (strata++) variance += size * size * (rate - last) * (rate - last) / 2;
    total += size, last = rate;
  }
  if (strata < 2) return 1;
  return sqrt(variance > 1 ? variance : 1) / total * spread_margin(strata);
}

__device__ inline int64_t surely_kept(const BracketCall& c, const Expert& expert) {
  return int64_t(c.rule.all_ties ? expert.kept : expert.above);
}

// After a round: where the ends must lie by what has been streamed so far.
static __global__ void aim_closer(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  expert.opened += int64_t(expert.listed - expert.counted);
  expert.counted = expert.listed;
  expert.search[0].stage = expert.search[1].stage = Search::idle;
  const int64_t kept = kept_of(c, k);
  if (int64_t(expert.listed) > c.state.capacity) *c.state.missed = 1;
  if (kept <= 0 || *c.state.missed) return;
  const double seen = double(*c.state.seen), share = seen / double(c.group.size);
  const double centre = double(kept) * share - double(surely_kept(c, expert));
  const double half = c.sigmas * tally_error(c, k) * seen * sqrt(1 - share) + 1;
  const auto aim = [&](double rank, Search& search) {
    if (rank < 1 || rank >= double(expert.opened)) return;  // beyond what is undecided: that end stays
    search = Search::over(expert.low.magnitude, expert.high.magnitude, int64_t(rank), c.group.size - 1);
  };
  aim(ceil(centre + half), expert.search[0]);
  aim(floor(centre - half), expert.search[1]);
}

static __global__ void close_bracket(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const bool all_ties = c.rule.all_ties;
  const auto reaching = [all_ties](const Search& s) {  // how many undecided entries reach the new end
    return all_ties ? s.larger + s.equal : s.passed + s.rank;
  };
  const Search &low = expert.search[0], &high = expert.search[1];
  if (low.stage == Search::done) {
    expert.low = bracket_end(c, low.cut);
    expert.opened = reaching(low);
  }
  if (high.stage == Search::done) {
    expert.high = bracket_end(c, high.cut);
    expert.opened -= reaching(high);
    expert.above = all_ties ? expert.kept + high.larger : expert.above + reaching(high);
    expert.kept += all_ties ? reaching(high) : 0;
  }
  for (int64_t s = k; s < kStrata; s += blockDim.x)
    for (int i = 0; i <= c.group.experts; ++i) c.state.tally[s * (1 + c.group.experts) + i] = 0;
}

// After the stream: reads the cut off the counts where they alone decide, searches where they do not, and
// finds out whether the bracket held.
static __global__ void judge(BracketCall c) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  expert.opened += int64_t(expert.listed - expert.counted);
  expert.counted = expert.listed;
  expert.search[0].stage = expert.search[1].stage = Search::idle;
  const int64_t kept = kept_of(c, k), surely = surely_kept(c, expert);
  if (int64_t(expert.listed) > c.state.capacity) *c.state.missed = 1;
  if (kept <= 0) return;
  expert.cut = expert.high;
  if (c.rule.all_ties) {
    if (int64_t(expert.above) < kept && kept <= int64_t(expert.kept)) return;  // the top is the threshold
    if (int64_t(expert.above) >= kept && expert.kept > 0) *c.state.missed = 1;
  }
  const bool to_the_bottom = expert.low.magnitude == 1 && expert.low.index == Cut::kAllIndices;
  if (kept == surely) return;
  if (kept < surely) {
    *c.state.missed = 1;
  } else if (kept == surely + expert.opened || (to_the_bottom && kept > surely + expert.opened)) {
    expert.cut = expert.low;
  } else if (kept < surely + expert.opened) {
    expert.search[0] =
        Search::over(expert.low.magnitude, expert.high.magnitude, kept - surely, c.group.size - 1);
  } else {
    *c.state.missed = 1;
  }
}

// The exact route, taken where the bracket failed: searches over everything.
static __global__ void aim_exactly(BracketCall c, bool always) {
  const int k = int(threadIdx.x);
  Expert& expert = c.state.expert[k];
  const int64_t kept = kept_of(c, k);
  expert.search[1].stage = Search::idle;
  if (!always && !*c.state.missed) return;
  expert.search[0].stage = Search::idle;
  expert.cut = kept < 0 ? Cut::keep_all() : Cut::keep_none();
  if (kept > 0) expert.search[0] = Search::over_all(kept, c.group.size - 1);
}

static __global__ void settle_cuts(BracketCall c) {
  Expert& expert = c.state.expert[threadIdx.x];
  if (expert.search[0].stage == Search::done) expert.cut = expert.search[0].cut;
  if (c.rule.all_ties && expert.cut.magnitude != ~0ull) expert.cut.index = Cut::kAllIndices;
}

}  // namespace pm::cuda
