#include "narrow.h"

#include <cmath>

#include "selection.h"

namespace pm {

double Tally::error(int cut) const {
  double variance = 0, total = 0, squares = 0, last_rate = 0;
  int64_t bins = 0;
  for (size_t bin = 0; bin < size_.size(); ++bin) {
    if (!size_[bin]) continue;
    const double size = double(size_[bin]);
    const double rate = double(halves_[bin * cuts_ + size_t(cut)]) / (2 * size);
    if (bins++) variance += size * size * (rate - last_rate) * (rate - last_rate) / 2;
    total += size, squares += size * size, last_rate = rate;
  }
  if (bins < 2) return 1;
  return std::sqrt(std::max(variance, 1.0)) / total * spread_margin(total * total / squares);
}

namespace {

// An end of some cut's bracket that moves.
struct End {
  int cut;
  bool high;
};

// Moves one end to where `place` found it. The low end of a bracket moves before its high end.
void move_end(const End& end, const Placed& place, bool all_ties, Bracket* bracket, Counts* counts) {
  const size_t k = size_t(end.cut);
  // All ties of a magnitude share one fate, so with them the bracket's ends know no index.
  const int64_t reaching = all_ties ? place.larger + place.equal : place.rank;
  const Cut cut{place.cut.magnitude, all_ties ? Cut::kAllIndices : place.cut.index};
  if (!end.high) {
    bracket->low[k] = cut;
    counts->opened[k] = reaching;
    return;
  }
  bracket->high[k] = cut;
  counts->opened[k] -= reaching;
  counts->above[k] = all_ties ? counts->kept[k] + place.larger : counts->above[k] + reaching;
  counts->kept[k] += all_ties ? reaching : 0;
}

}  // namespace

template <class Work>
void narrow_bracket(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Tally& tally,
                    int64_t seen, Bracket* bracket, Counts* counts) {
  Selection<Work> selection(group, crew, store, *bracket);
  const bool all_ties = group.rule().all_ties;
  const double share = double(seen) / double(group.size);
  std::vector<Search> searches;
  std::vector<End> ends;
  for (int k = 0; k < group.cuts(); ++k) {
    const int64_t kept = group.rank(k), opened = counts->opened[size_t(k)];
    if (kept <= 0) continue;
    const int64_t surely = all_ties ? counts->kept[size_t(k)] : counts->above[size_t(k)];
    const double centre = double(kept) * share - double(surely);
    const double error = tally.error(k) * double(seen) * std::sqrt(1 - share);
    const double half = group.run().settings.sigmas * error + 1;
    auto move = [&](double rank, bool high) {
      if (rank < 1 || rank >= double(opened)) return;  // beyond what is undecided: that end stays
      searches.push_back(selection.search(k, int64_t(rank), opened));
      ends.push_back({k, high});
    };
    move(std::ceil(centre + half), false);
    move(std::floor(centre - half), true);
  }
  const std::vector<Placed> found = selection.find(std::move(searches));
  for (size_t i = 0; i < found.size(); ++i) move_end(ends[i], found[i], all_ties, bracket, counts);
}

template void narrow_bracket(const Group<float>&, Crew&, const UndecidedStore&, const Tally&, int64_t,
                             Bracket*, Counts*);
template void narrow_bracket(const Group<double>&, Crew&, const UndecidedStore&, const Tally&, int64_t,
                             Bracket*, Counts*);

}  // namespace pm
