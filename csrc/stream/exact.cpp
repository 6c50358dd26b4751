// The exact route: every cut of a group by counting passes over its inputs.
#include "digits.h"
#include "merge.h"

namespace pm {

template <class Work>
std::vector<Cut> exact_cuts(const Group<Work>& group, Crew& crew) {
  using Bits = typename WorkTraits<Work>::Bits;
  std::vector<Cut> cuts(size_t(group.cuts()), Cut::keep_all());
  std::vector<int64_t> ranks;
  std::vector<int> cut_of;
  for (int cut = 0; cut < group.cuts(); ++cut) {
    if (group.rank(cut) == 0) cuts[size_t(cut)] = Cut::keep_none();
    if (group.rank(cut) <= 0) continue;
    ranks.push_back(group.rank(cut));
    cut_of.push_back(cut);
  }
  const int64_t tile = group.run().settings.tile;
  auto keys_of = [&](int member, int64_t number, const typename DigitSearch<Bits>::Body& body) {
    Worker& worker = group.run().workers[size_t(member)];
    const auto piece = group.piece(number, tile);
    const JobView& view = group.views[piece.tensor];
    view.load(worker, piece.first, piece.count);
    std::vector<Bits> keys(static_cast<size_t>(piece.count));
    for (size_t s = 0; s < cut_of.size(); ++s) {
      const int k = group.expert_of(cut_of[s]);
      group.kernels(view).keys(worker.tile.base, worker.tile.expert[size_t(k)], piece.count, keys.data());
      body(s, keys);
    }
  };
  DigitSearch<Bits> search(crew, group.piece_count(tile), int64_t(group.size), ranks.size(), keys_of, false);
  search.count();
  const std::vector<RankSearch> found = search.run(ranks);
  for (size_t s = 0; s < found.size(); ++s) cuts[size_t(cut_of[s])] = {found[s].prefix, Cut::kAllIndices};
  if (group.rule().all_ties) return cuts;
  const auto places = search.places();
  for (size_t s = 0; s < places.size(); ++s) {
    const auto piece = group.piece(places[s].piece, tile);
    cuts[size_t(cut_of[s])].index = group.flat(piece.tensor, piece.first + places[s].at) + 1;
  }
  return cuts;
}

template std::vector<Cut> exact_cuts(const Group<float>&, Crew&);
template std::vector<Cut> exact_cuts(const Group<double>&, Crew&);

}  // namespace pm
