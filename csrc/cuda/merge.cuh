// The order of the stages; see merge.h.
#pragma once
#include "bracket.cuh"
#include "map.cuh"
#include "merge.h"
#include "rescale.cuh"
#include "workspace.h"

namespace pm::cuda {

constexpr int kGrowth = 4;  // each round streams fifteen times what was streamed before it
constexpr int kBlocksPerProcessor = 8;

template <class T>
class GroupMerge {
 public:
  // `only_check`: nothing is started, but every kernel that would be is checked.
  GroupMerge(const Request& request, bool only_check)
      : r_(request),
        group_(request.group),
        stream_(request.stream),
        rule_(rule_of(request)),
        only_check_(only_check) {
    int64_t bytes, control;
    state_ = carve(request, &bytes, &control);
    if (!only_check) clear(stream_, request.workspace, size_t(control));
    most_blocks_ = processors() * kBlocksPerProcessor;
  }

  void run() {
    if (group_.pieces == 0) return;
    if (!by_magnitude(r_.trim) || all_kept()) {
      if (r_.trim == Trim::random && r_.rescale) rescale(true);
      return map(Collect::no, by_magnitude(r_.trim) ? Trim::none : r_.trim, nullptr);
    }
    const bool outliers = r_.trim == Trim::outliers;
    if (r_.own_cuts) {
      const unsigned cuts = unsigned(outliers ? 2 * group_.experts : group_.experts);
      start(dim3(unsigned(group_.tensors), cuts), kThreads, find_small_cuts<T>, group_, rule_, state_);
    } else if (outliers || r_.rescale || group_.size < 4 * r_.samples) {
      search_exactly(true);
    } else {
      return stream_once();
    }
    if (r_.rescale) rescale(false);
    map(Collect::no, r_.trim, nullptr);
  }

 private:
  template <class... P, class... A>
  void start(dim3 blocks, int threads, void (*kernel)(P...), A... args) const {
    if (only_check_)
      require(threads, kernel);
    else
      launch(stream_, blocks, threads, kernel, args...);
  }
  bool all_kept() const {
    for (double density : r_.density)
      if (density < 1) return false;
    return true;
  }
  dim3 blocks(int64_t wanted, int rows = 1) const {
    return dim3(unsigned(wanted < most_blocks_ ? wanted : most_blocks_), unsigned(rows));
  }
  BracketCall bracket() const { return {group_, rule_, state_, r_.sigmas, r_.bias}; }
  void each_expert(void (*step)(BracketCall)) { start(dim3(1), group_.experts, step, bracket()); }

  // Reads every input once: sample, stream in rounds with an ever closer bracket, select, fix up.
  void stream_once() {
    const FromSample sample{state_, group_.size, group_.size / (state_.samples / FromSample::kCluster)};
    start(dim3(unsigned((state_.samples + kThreads - 1) / kThreads)), kThreads, sample_keys<T>, group_,
          sample);
    each_expert(aim_middle);
    find(sample);
    start(dim3(unsigned(group_.experts)), kThreads, aim_ends, bracket(), sample);
    find(sample);
    each_expert(open_bracket);
    const Rounds rounds = Rounds::scattered_first(group_.pieces, kGrowth);
    for (int round = 0; round < rounds.count(); ++round) {
      map(r_.all_ties ? Collect::all : Collect::first, Trim::magnitude, nullptr, &rounds, round);
      if (round + 1 == rounds.count()) break;
      each_expert(aim_closer);
      find(FromList{state_});
      each_expert(close_bracket);
    }
    each_expert(judge);
    find(FromList{state_});
    search_exactly(false);
    launch_fix_up();
    map(Collect::no, Trim::magnitude, state_.missed);
  }

  void search_exactly(bool always) {
    start(dim3(1), group_.experts, aim_exactly, bracket(), always);
    find(FromInputs<T>{group_});
    each_expert(settle_cuts);
  }

  template <class Source>
  void find(const Source& source) {
    const int passes = kMagnitudePasses + (r_.all_ties ? 0 : index_passes(group_.size));
    for (int pass = 0; pass < passes; ++pass)
      start(blocks(search_blocks(source), 2 * group_.experts), kThreads, narrow_searches<Source>, source,
            state_, r_.all_ties);
  }
  int64_t search_blocks(const FromSample&) const { return 8; }
  int64_t search_blocks(const FromList&) const { return most_blocks_ / group_.experts + 1; }
  int64_t search_blocks(const FromInputs<T>&) const { return group_.pieces; }

  void rescale(bool random) {
    scaled_ = true;
    const RescaleCall call{group_, rule_, state_, random, r_.own_cuts};
    start(dim3(unsigned((group_.blocks + kBlocksAtOnce - 1) / kBlocksAtOnce), unsigned(group_.experts)),
          kThreads, sum_masses<T>, call);
    start(dim3(unsigned(group_.tensors)), group_.experts, set_scales, call);
  }

  bool unit() const {
    for (double weight : r_.weight)
      if (weight != 1) return false;
    return !scaled_ && r_.late.empty();
  }
  MapCall call(const int* only_if, const Rounds& rounds, int round) const {
    return {group_, rule_, state_, rounds, round, r_.own_cuts, scaled_, only_if};
  }

  // Thresholds and factors must be known; with `collect` they are the bracket's.
  void map(Collect collect, Trim trim, const int* only_if, const Rounds* rounds = nullptr, int round = 0) {
    const Rounds in_order = Rounds::in_order(group_.pieces);
    const MapCall call = this->call(only_if, rounds ? *rounds : in_order, round);
    start(blocks(call.rounds.places(round)), kThreads, kernel(collect, trim), call);
  }

  using Kernel = void (*)(MapCall);
  Kernel kernel(Collect collect, Trim trim) const {
    if (!r_.base) return map_pieces<Shape<T, false, Trim::none, false, false>>;
    if (trim == Trim::magnitude)
      return unit() ? magnitude_kernel<true>(collect) : magnitude_kernel<false>(collect);
    if (trim == Trim::outliers) return unit() ? outlier_kernel<true>() : outlier_kernel<false>();
    if (trim == Trim::random)
      return r_.elect ? map_pieces<Shape<T, true, Trim::random, true, false>>
                      : map_pieces<Shape<T, true, Trim::random, false, false>>;
    if (!r_.elect) return map_pieces<Shape<T, true, Trim::none, false, false>>;
    return unit() ? map_pieces<Shape<T, true, Trim::none, true, true>>
                  : map_pieces<Shape<T, true, Trim::none, true, false>>;
  }
  template <bool kUnit>
  static Kernel magnitude_kernel(Collect collect) {
    constexpr Trim magnitude = Trim::magnitude;
    if (collect == Collect::first) return map_pieces<Shape<T, true, magnitude, true, kUnit, Collect::first>>;
    if (collect == Collect::all) return map_pieces<Shape<T, true, magnitude, true, kUnit, Collect::all>>;
    return map_pieces<Shape<T, true, magnitude, true, kUnit>>;
  }
  template <bool kUnit>
  Kernel outlier_kernel() const {
    return r_.elect ? map_pieces<Shape<T, true, Trim::outliers, true, kUnit>>
                    : map_pieces<Shape<T, true, Trim::outliers, false, kUnit>>;
  }
  void launch_fix_up() {
    const MapCall call = this->call(nullptr, Rounds::in_order(group_.pieces), 0);
    const dim3 grid = blocks(most_blocks_ / group_.experts + 1, group_.experts);
    if (unit())
      start(grid, kThreads, fix_up<Shape<T, true, Trim::magnitude, true, true>>, call);
    else
      start(grid, kThreads, fix_up<Shape<T, true, Trim::magnitude, true, false>>, call);
  }

  const Request& r_;
  const Group group_;
  const Stream stream_;
  const Rule rule_;
  State state_;
  const bool only_check_;
  int64_t most_blocks_;
  bool scaled_ = false;  // the factors are known
};

template <class T>
void merge(const Request& request) {
  GroupMerge<T>(request, false).run();
}

template <class T>
void check(const Request& request) {
  GroupMerge<T>(request, true).run();
}

}  // namespace pm::cuda
