#include "narrow.h"

#include "selection.h"

namespace pm {

double Tally::error(int cut) const {
  ShareError shares;
  for (size_t bin = 0; bin < size_.size(); ++bin) {
    const double size = double(size_[bin]);
    if (size > 0) shares.add(size, double(halves_[bin * cuts_ + size_t(cut)]) / (2 * size));
  }
  return shares.error();
}

namespace {

// An end of some cut's bracket that moves.
struct End {
  int cut;
  bool high;
};

void move_end(const End& end, const Placed& place, bool all_ties, Bracket* bracket, Counts* counts) {
  const size_t k = size_t(end.cut);
  CutCounts moved = counts->at(k);
  if (end.high)
    move_high(place, all_ties, &moved);
  else
    move_low(place, all_ties, &moved);
  (end.high ? bracket->high : bracket->low)[k] = place.end(all_ties);
  counts->set(k, moved);
}

}  // namespace

template <class Work>
void narrow_bracket(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Tally& tally,
                    int64_t seen, Bracket* bracket, Counts* counts) {
  Selection<Work> selection(group, crew, store, *bracket);
  const bool all_ties = group.rule().all_ties;
  std::vector<Search> searches;
  std::vector<End> ends;
  for (int k = 0; k < group.cuts(); ++k) {
    const int64_t wanted = group.rank(k);
    if (wanted <= 0) continue;
    const CutCounts counted = counts->at(size_t(k));
    const Ends closer = closer_ends(wanted, counted.surely_kept(all_ties), seen, int64_t(group.size),
                                    tally.error(k), group.run().settings.sigmas);
    const auto move = [&](double rank, bool high) {
      if (!moves(rank, counted.opened)) return;
      searches.push_back(selection.search(k, int64_t(rank), counted.opened));
      ends.push_back({k, high});
    };
    move(closer.low, false);
    move(closer.high, true);
  }
  const std::vector<Placed> found = selection.find(std::move(searches));
  for (size_t i = 0; i < found.size(); ++i) move_end(ends[i], found[i], all_ties, bracket, counts);
}

template void narrow_bracket(const Group<float>&, Crew&, const UndecidedStore&, const Tally&, int64_t,
                             Bracket*, Counts*);
template void narrow_bracket(const Group<double>&, Crew&, const UndecidedStore&, const Tally&, int64_t,
                             Bracket*, Counts*);

}  // namespace pm
