// Searches the cuts of several groups over the same inputs at once, before anything is written.
#include <map>

#include "streaming.h"

namespace pm {

namespace {

// One expert's cuts at these ranks, each exact.
template <class Work>
std::vector<Cut> search_expert(const Group<Work>& whole, int expert, std::vector<int64_t> ranks, Crew& crew) {
  const Group<Work> group(whole, expert, std::move(ranks));
  Report& report = group.run().report;
  report.searched += 1;
  Bracket bracket = sample_bracket(group, crew);
  try {
    UndecidedStore store(group.run(), group.experts(), group.views[0].kernel_item());
    const Counts counts = Streaming<Work>(group, crew, nullptr).run(store, &bracket);
    std::vector<Cut> cuts;
    if (select_cuts(group, crew, store, bracket, counts, &cuts)) return cuts;
    report.misses += 1;
  } catch (const Overflow&) {
    report.overflows += 1;
  }
  return exact_cuts(group, crew);
}

}  // namespace

template <class Work>
std::vector<std::vector<Cut>> search_cuts(const std::vector<const Group<Work>*>& groups, Crew& crew) {
  if (groups[0]->is_whole()) {
    const Tile tile = load_whole(*groups[0], crew);
    std::vector<std::vector<Cut>> all;
    for (const Group<Work>* group : groups) all.push_back(whole_cuts(*group, tile, crew));
    return all;
  }
  const int experts = groups[0]->experts();
  std::vector<std::map<int64_t, Cut>> found(static_cast<size_t>(experts));  // by rank
  for (const Group<Work>* group : groups)
    for (int cut = 0; cut < group->cuts(); ++cut)
      if (group->rank(cut) > 0) found[size_t(group->expert_of(cut))][group->rank(cut)] = {};
  for (int k = 0; k < experts; ++k) {
    std::vector<int64_t> ranks;
    for (const auto& [rank, cut] : found[size_t(k)]) ranks.push_back(rank);
    if (ranks.empty()) continue;
    const std::vector<Cut> cuts = search_expert(*groups[0], k, ranks, crew);
    for (size_t i = 0; i < ranks.size(); ++i) found[size_t(k)][ranks[i]] = cuts[i];
  }
  std::vector<std::vector<Cut>> all;
  for (const Group<Work>* group : groups) {
    all.emplace_back();
    for (int cut = 0; cut < group->cuts(); ++cut) {
      const int64_t rank = group->rank(cut);
      all.back().push_back(rank < 0    ? Cut::keep_all()
                           : rank == 0 ? Cut::keep_none()
                                       : found[size_t(group->expert_of(cut))][rank]);
    }
  }
  return all;
}

template std::vector<std::vector<Cut>> search_cuts(const std::vector<const Group<float>*>&, Crew&);
template std::vector<std::vector<Cut>> search_cuts(const std::vector<const Group<double>*>&, Crew&);

}  // namespace pm
