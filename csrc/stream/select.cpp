// The exact threshold of each expert from the undecided, proved by the counts of the whole stream.
#include "selection.h"

namespace pm {

namespace {

// Reads the exact cut off the counts where they alone decide; otherwise says what to search for.
enum class Verdict { decided, search, missed };

Verdict judge(int64_t kept, const Cut& low, const Cut& high, int64_t surely, int64_t opened, Cut* cut,
              int64_t* rank) {
  const bool to_the_bottom = low.magnitude == 1 && low.index == Cut::kAllIndices;
  *cut = high;
  if (kept == surely) return Verdict::decided;
  if (kept < surely) return Verdict::missed;
  *cut = low;
  if (kept == surely + opened || (to_the_bottom && kept > surely + opened)) return Verdict::decided;
  *rank = kept - surely;
  return kept < surely + opened ? Verdict::search : Verdict::missed;
}

}  // namespace

template <class Work>
bool select_cuts(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Bracket& bracket,
                 const Counts& counts, std::vector<Cut>* cuts) {
  Selection<Work> selection(group, crew, store, bracket);
  *cuts = bracket.high;
  std::vector<Search> searches;
  for (int cut = 0; cut < group.cuts(); ++cut) {
    const size_t i = size_t(cut);
    const int64_t kept = group.rank(cut);
    if (kept <= 0) continue;
    int64_t surely = counts.above[i], rank = 0;
    if (group.rule().all_ties) {
      if (counts.above[i] < kept && kept <= counts.kept[i]) continue;  // the threshold is the bracket's top
      if (counts.above[i] >= kept && counts.kept[i] > 0) return false;
      surely = counts.kept[i];
    }
    switch (judge(kept, bracket.low[i], bracket.high[i], surely, counts.opened[i], &(*cuts)[i], &rank)) {
      case Verdict::decided: break;
      case Verdict::missed: return false;
      case Verdict::search: searches.push_back(selection.search(cut, rank, counts.opened[i]));
    }
  }
  std::vector<int> searched;
  for (const Search& s : searches) searched.push_back(s.range.cut);
  const std::vector<Placed> found = selection.find(std::move(searches));
  for (size_t i = 0; i < found.size(); ++i) (*cuts)[size_t(searched[i])] = found[i].cut;
  if (group.rule().all_ties)
    for (Cut& cut : *cuts)
      if (cut.magnitude != Cut::keep_none().magnitude) cut.index = Cut::kAllIndices;
  return true;
}

template bool select_cuts(const Group<float>&, Crew&, const UndecidedStore&, const Bracket&, const Counts&,
                          std::vector<Cut>*);
template bool select_cuts(const Group<double>&, Crew&, const UndecidedStore&, const Bracket&, const Counts&,
                          std::vector<Cut>*);

}  // namespace pm
