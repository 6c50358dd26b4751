#include "merge.h"

#include <algorithm>

#include "further.h"
#include "streaming.h"

namespace pm {

namespace {

template <class Work>
class GroupMerge {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  GroupMerge(Group<Work>& group, Crew& crew)
      : group_(group), run_(group.run()), rule_(group.rule()), crew_(crew) {
    params_.reserve(group.views.size());
    for (size_t t = 0; t < group.views.size(); ++t) params_.emplace_back(rule_);
  }

  void merge() {
    if (!by_magnitude(rule_.trim) || !group_.trims()) return map({});
    if (!run_.cuts[size_t(group_.number)].empty()) return finish(run_.cuts[size_t(group_.number)]);
    run_.report.searched += 1;
    if (group_.is_small() || !group_.searched()) return finish(small_cuts());
    // With `rescale` all is mapped again anyway, and a search does not tell where a cut among zeros lies.
    if (!group_.further.empty() && !rule_.rescale) return finish(search_cuts<Work>({&group_}, crew_)[0]);
    Bracket bracket = sample_bracket(group_, crew_);
    Streaming<Work> streaming(group_, crew_, &params_);
    try {
      UndecidedStore store(run_, group_.experts(), group_.views[0].kernel_item());
      const Counts counts = streaming.run(store, &bracket);
      std::vector<Cut> cuts;
      if (select_cuts(group_, crew_, store, bracket, counts, &cuts)) {
        run_.report.undecided += store.rows();
        run_.cuts[size_t(group_.number)] = cuts;
        if (!rule_.rescale) {
          group_.count_nan(streaming.nan());
          return fix_up(group_, crew_, store, cuts, params_);
        }
        rescale(group_, crew_, cuts, &params_);
        if (scales_finite()) return map(cuts);
        return finish(exact_cuts(group_, crew_));  // a zero times an infinite scale counts: its index matters
      }
      run_.report.misses += 1;
    } catch (const Overflow&) {
      run_.report.overflows += 1;
    }
    finish(exact_cuts(group_, crew_));
  }

 private:
  bool scales_finite() const {
    for (const auto& p : params_)
      for (Work scale : p.scale)
        if (!std::isfinite(scale)) return false;
    return true;
  }

  void finish(const std::vector<Cut>& cuts) {
    run_.cuts[size_t(group_.number)] = cuts;
    if (rule_.rescale) rescale(group_, crew_, cuts, &params_);
    map(cuts);
  }

  std::vector<Cut> small_cuts() {
    const int experts = group_.experts();
    std::vector<Cut> cuts(static_cast<size_t>(group_.cuts()), Cut::keep_all());
    for (int cut = 0; cut < group_.cuts(); ++cut)
      if (group_.rank(cut) == 0) cuts[size_t(cut)] = Cut::keep_none();
    if (!group_.searched()) return cuts;
    std::vector<std::vector<Bits>> keys(static_cast<size_t>(experts), std::vector<Bits>(group_.size));
    Worker& worker = run_.workers[size_t(crew_.size() - 1)];
    for (size_t t = 0; t < group_.views.size(); ++t) {
      const JobView& view = group_.views[t];
      view.load(worker, 0, view.job().count);
      for (int k = 0; k < experts; ++k)
        group_.kernels(view).keys(worker.tile.base, worker.tile.expert[size_t(k)], view.job().count,
                                  keys[size_t(k)].data() + group_.origins[t]);
    }
    for (int cut = 0; cut < group_.cuts(); ++cut) {
      if (group_.rank(cut) <= 0) continue;
      const Bits* key_of = keys[size_t(group_.expert_of(cut))].data();
      const auto [key, last] = Ranking<Bits>(key_of, int64_t(group_.size)).at(group_.rank(cut));
      cuts[size_t(cut)] = {key, rule_.all_ties ? Cut::kAllIndices : uint64_t(last) + 1};
    }
    return cuts;
  }

  // The plain pass: thresholds (if any) are final.
  void map(const std::vector<Cut>& cuts) {
    const int64_t tile = run_.settings.tile;
    const Rounds rounds = Rounds::in_order(group_.piece_count(tile));
    each_piece(group_, crew_, rounds, 0, tile, [&](int member, int64_t, const auto& piece) {
      Worker& worker = run_.workers[size_t(member)];
      const JobView& view = group_.views[piece.tensor];
      view.load(worker, piece.first, piece.count);
      void* out = view.result(worker.result, piece.first, piece.count);
      FurtherResults<Work> further(group_, worker, piece.tensor, piece.first, piece.count);
      void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
      const uint64_t flat = group_.flat(piece.tensor, piece.first);
      const MapFn<Work> kernel = kernel_for(group_, view, params_[piece.tensor], Collect::no);
      std::vector<Bits> keep;
      each_segment({cuts}, flat, piece.count, [&](int64_t begin, int64_t size) {
        thresholds_at<Work>(cuts, flat + uint64_t(begin), &keep);
        MapBlock<Work> block = block_at<Work>(worker, view, out, begin, size);
        block.keep_at = keep.data();
        further.attach(&block, begin);
        group_.count_nan(kernel(params_[piece.tensor].block, block, scratch));
      });
      view.store(worker, piece.first, piece.count, out);
      further.store();
    });
  }

  Group<Work>& group_;
  RunContext& run_;
  const Rule& rule_;
  Crew& crew_;
  std::vector<TensorParams<Work>> params_;
};

}  // namespace

template <class Work>
void merge_group(Group<Work>& group, Crew& crew) {
  GroupMerge<Work>(group, crew).merge();
}

template void merge_group(Group<float>&, Crew&);
template void merge_group(Group<double>&, Crew&);

}  // namespace pm
