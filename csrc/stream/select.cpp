// The exact threshold of each expert from the undecided, proved by the counts of the whole stream.
#include "selection.h"

namespace pm {

template <class Work>
bool select_cuts(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Bracket& bracket,
                 const Counts& counts, std::vector<Cut>* cuts) {
  Selection<Work> selection(group, crew, store, bracket);
  *cuts = bracket.high;
  std::vector<Search> searches;
  for (int cut = 0; cut < group.cuts(); ++cut) {
    const size_t i = size_t(cut);
    const int64_t wanted = group.rank(cut);
    if (wanted <= 0) continue;
    const Verdict verdict =
        verdict_on(wanted, bracket.low[i], bracket.high[i], counts.at(i), group.rule().all_ties);
    if (verdict.kind == Verdict::missed) return false;
    (*cuts)[i] = verdict.cut;
    if (verdict.kind == Verdict::search)
      searches.push_back(selection.search(cut, verdict.rank, counts.opened[i]));
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
