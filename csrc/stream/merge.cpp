#include "merge.h"

#include <algorithm>

#include "further.h"
#include "streaming.h"

namespace pm {

namespace {

template <class Work>
std::vector<TensorParams<Work>> params_of(const Group<Work>& group) {
  std::vector<TensorParams<Work>> params;
  params.reserve(group.views.size());
  for (size_t t = 0; t < group.views.size(); ++t) params.emplace_back(group.rule());
  return params;
}

// What a plain pass over one group needs; thresholds (if any) are final.
template <class Work>
struct MapTask {
  const Group<Work>& group;
  const std::vector<Cut>& cuts;
  const std::vector<TensorParams<Work>>& params;
};

template <class Work>
void map_piece(const MapTask<Work>& task, Worker& worker, const typename Group<Work>::Piece& piece) {
  const Group<Work>& group = task.group;
  const JobView& view = group.views[piece.tensor];
  const TensorParams<Work>& params = task.params[piece.tensor];
  void* out = view.result(worker.result, piece.first, piece.count);
  FurtherResults<Work> further(group, worker, piece.tensor, piece.first, piece.count);
  void* scratch = worker.scratch.reserve(map_scratch_bytes(group.experts()));
  const uint64_t flat = group.flat(piece.tensor, piece.first);
  const MapFn<Work> kernel = kernel_for(group, view, params, Collect::no);
  std::vector<typename WorkTraits<Work>::Bits> keep;
  each_segment({task.cuts}, flat, piece.count, [&](int64_t begin, int64_t size) {
    thresholds_at<Work>(task.cuts, flat + uint64_t(begin), &keep);
    MapBlock<Work> block = block_at<Work>(worker, view, out, begin, size);
    block.keep_at = keep.data();
    further.attach(&block, begin);
    group.count_nan(kernel(params.block, block, scratch));
  });
  view.store(worker, piece.first, piece.count, out);
  further.store();
}

// Groups over the same inputs, each piece of which is read once for all of them.
template <class Work>
void map_groups(const std::vector<MapTask<Work>>& tasks, Crew& crew) {
  const Group<Work>& first = tasks[0].group;
  const int64_t tile = first.run().settings.tile;
  const Rounds rounds = Rounds::in_order(first.piece_count(tile));
  each_piece(first, crew, rounds, 0, tile, [&](int member, int64_t, const auto& piece) {
    Worker& worker = first.run().workers[size_t(member)];
    first.views[piece.tensor].load(worker, piece.first, piece.count);
    for (const MapTask<Work>& task : tasks) map_piece(task, worker, piece);
  });
}

template <class Work>
class GroupMerge {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  GroupMerge(Group<Work>& group, Crew& crew)
      : group_(group), run_(group.run()), rule_(group.rule()), crew_(crew), params_(params_of(group)) {}

  void merge() {
    if (!by_magnitude(rule_.trim) || !group_.trims()) return map({});
    if (!run_.cuts[size_t(group_.number)].empty()) return finish(run_.cuts[size_t(group_.number)]);
    run_.report.searched += 1;
    if (group_.searched() && group_.is_whole()) return merge_whole();
    if (group_.is_small() || !group_.searched()) return finish(small_cuts());
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

  // Every input is read once, but for `rescale`.
  void merge_whole() {
    const Tile tile = load_whole(group_, crew_);
    const std::vector<Cut> cuts = whole_cuts(group_, tile, crew_);
    if (rule_.rescale) return finish(cuts);
    run_.cuts[size_t(group_.number)] = cuts;
    const JobView& view = group_.views[0];
    crew_.each(group_.piece_count(run_.settings.tile), [&](int member, int64_t number) {
      const auto piece = group_.piece(number, run_.settings.tile);
      Worker& worker = run_.workers[size_t(member)];
      worker.tile = tile;
      for (const void*& expert : worker.tile.expert) expert = view.shifted(expert, piece.first);
      if (tile.base) worker.tile.base = view.shifted(tile.base, piece.first);
      map_piece<Work>({group_, cuts, params_}, worker, piece);
    });
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
      const int64_t size = int64_t(group_.size);
      void* memory = worker.words.reserve(KeyRanking<Bits>::bytes(size));
      const PlacedKey<Bits> last = KeyRanking<Bits>(key_of, size, memory).at(group_.rank(cut));
      cuts[size_t(cut)] = {last.key(last), rule_.all_ties ? Cut::kAllIndices : uint64_t(last.place()) + 1};
    }
    return cuts;
  }

  void map(const std::vector<Cut>& cuts) { map_groups<Work>({{group_, cuts, params_}}, crew_); }

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

template <class Work>
void map_together(const std::vector<Group<Work>*>& groups, Crew& crew) {
  std::vector<std::vector<TensorParams<Work>>> params;
  std::vector<MapTask<Work>> tasks;
  params.reserve(groups.size());
  for (const Group<Work>* group : groups) {
    params.push_back(params_of(*group));
    tasks.push_back({*group, group->run().cuts[size_t(group->number)], params.back()});
  }
  map_groups(tasks, crew);
}

template void map_together(const std::vector<Group<float>*>&, Crew&);
template void map_together(const std::vector<Group<double>*>&, Crew&);
template void merge_group(Group<float>&, Crew&);
template void merge_group(Group<double>&, Crew&);

}  // namespace pm
