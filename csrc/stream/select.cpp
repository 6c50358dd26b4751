// The exact threshold of each expert from the undecided positions, in memory that does not grow with them.
#include <algorithm>
#include <mutex>

#include "merge.h"

namespace pm {

namespace {

constexpr int64_t kBins = 4096;          // per narrowing step
constexpr int64_t kGatherable = 1 << 16; // candidates of one expert that are sorted out directly: 1 MiB

// One expert's search: the `rank`-th largest among undecided keys with magnitude in [low, high].
struct Search {
  int expert;
  int64_t rank, count;
  uint64_t low, high;
  int shift = 0;
  std::vector<int64_t> bins;

  void prepare() {
    shift = 0;
    while (((high - low) >> shift) >= uint64_t(kBins)) ++shift;
    bins.assign(size_t(kBins), 0);
  }
  void narrow() {
    size_t bin = size_t(kBins) - 1;
    for (; bins[bin] < rank; --bin) rank -= bins[bin];
    low += uint64_t(bin) << shift;
    high = std::min(high, low + (uint64_t(1) << shift) - 1);
    count = bins[bin];
  }
};

struct Candidate {
  uint64_t key, index;
  bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : index < other.index; }
};

template <class Work>
class Selection {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  Selection(const Group<Work>& group, Crew& crew, UndecidedStore& store, const Bracket& bracket)
      : group_(group), crew_(crew), store_(store), bracket_(bracket) {}

  void narrow(std::vector<Search>& searches) {
    for (Search& s : searches) s.prepare();
    std::mutex mutex;
    each_chunk(searches, [&](const Search& s, const Found& found) {
      std::vector<int64_t> bins(static_cast<size_t>(kBins));
      for (int64_t i = 0; i < found.count; ++i) ++bins[size_t((found.key[i] - s.low) >> s.shift)];
      std::lock_guard lock(mutex);
      for (size_t b = 0; b < size_t(kBins); ++b) const_cast<Search&>(s).bins[b] += bins[b];
    });
    for (Search& s : searches) s.narrow();
  }

  void gather(const std::vector<Search>& searches, std::vector<Cut>* cuts) {
    std::vector<std::vector<Candidate>> found(searches.size());
    std::mutex mutex;
    each_chunk(searches, [&](const Search& s, const Found& here) {
      std::lock_guard lock(mutex);
      auto& list = found[size_t(&s - searches.data())];
      for (int64_t i = 0; i < here.count; ++i) list.push_back({here.key[i], here.flat + here.position[here.row[i]]});
    });
    for (size_t i = 0; i < searches.size(); ++i) {
      const auto nth = found[i].begin() + (searches[i].rank - 1);
      std::nth_element(found[i].begin(), nth, found[i].end());
      (*cuts)[size_t(searches[i].expert)] = {nth->key, nth->index + 1};
    }
  }

  // Too many equal keys to gather: count them per cell, then look into the one cell that holds the last kept.
  Cut nth_equal(const Search& search) {
    std::mutex mutex;
    auto each_equal = [&](auto&& body) {
      each_chunk({search}, [&](const Search&, const Found& found) {
        std::lock_guard lock(mutex);
        for (int64_t i = 0; i < found.count; ++i) body(found.flat + found.position[found.row[i]]);
      });
    };
    constexpr int kCell = 16;  // cells of 65,536 elements
    std::vector<int64_t> cells(size_t(group_.size >> kCell) + 1);
    each_equal([&](uint64_t index) { ++cells[size_t(index >> kCell)]; });
    int64_t rank = search.rank;
    size_t cell = 0;
    for (; cells[cell] < rank; ++cell) rank -= cells[cell];
    std::vector<uint64_t> inside;
    each_equal([&](uint64_t index) {
      if (index >> kCell == cell) inside.push_back(index);
    });
    std::nth_element(inside.begin(), inside.begin() + (rank - 1), inside.end());
    return {search.low, inside[size_t(rank - 1)] + 1};
  }

 private:
  // Undecided keys of one span: element `position[row[i]]` counted from flat index `flat` has key[i].
  struct Found {
    const Bits* key;
    const uint32_t *row, *position;
    uint64_t flat;
    int64_t count;
  };

  // body(search, found) for the undecided keys of every search within [low, high], span by span.
  template <class F>
  void each_chunk(const std::vector<Search>& searches, F&& body) {
    crew_.each(int64_t(store_.chunks().size()), [&](int member, int64_t number) {
      Worker& worker = group_.run().workers[size_t(member)];
      const Chunk& chunk = *store_.chunks()[size_t(number)];
      if (chunk.size == 0) return;
      char* slab = store_.open(chunk, worker);
      const size_t room = size_t(chunk.size + kMaxGroup);
      Bits* keys = worker.wide.reserve_for<Bits>(room);
      uint32_t* rows = worker.cast.reserve_for<uint32_t>(room);
      for (const Search& s : searches)
        for (const Span& span : chunk.spans) body(s, open_keys(span, slab, s, keys, rows));
    });
  }

  Found open_keys(const Span& span, char* slab, const Search& s, Bits* keys, uint32_t* rows) {
    const ChunkLayout& layout = store_.layout();
    const uint32_t* position = layout.position(slab);
    const JobView& view = group_.views[size_t(span.tensor)];
    const uint64_t flat = group_.flat(size_t(span.tensor), span.origin);
    const std::vector<Cut> low{bracket_.low[size_t(s.expert)]}, high{bracket_.high[size_t(s.expert)]};
    OpenKeys<Bits> to{keys, rows, 0, 0};
    each_segment({&low, &high}, flat, span.size, [&](int64_t first, int64_t size) {
      const auto begin = std::lower_bound(position + span.begin, position + span.end, uint32_t(first)) - position;
      const auto end = std::lower_bound(position + begin, position + span.end, uint32_t(first + size)) - position;
      const Bits from = std::max(threshold_at<Bits>(low[0], flat + uint64_t(first)), Bits(s.low));
      const Bits below = std::min(threshold_at<Bits>(high[0], flat + uint64_t(first)), Bits(s.high + 1));
      const int64_t offset = begin * layout.item;
      to.origin = uint32_t(begin);
      group_.kernels(view).open_keys(layout.base(slab) + offset, layout.expert(slab, s.expert) + offset, end - begin, from,
                                     below, &to);
    });
    return {keys, rows, position, flat, to.size};
  }

  const Group<Work>& group_;
  Crew& crew_;
  UndecidedStore& store_;
  const Bracket& bracket_;
};

// Reads the exact cut off the counts where they alone decide; otherwise says what to search for.
enum class Verdict { decided, search, missed };

Verdict judge(int64_t kept, const Cut& low, const Cut& high, int64_t surely, int64_t opened, Cut* cut, int64_t* rank) {
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
bool select_cuts(const Group<Work>& group, Crew& crew, UndecidedStore& store, const Bracket& bracket,
                 const Counts& counts, std::vector<Cut>* cuts) {
  *cuts = bracket.high;
  std::vector<Search> searches;
  for (int k = 0; k < group.experts(); ++k) {
    const size_t i = size_t(k);
    const int64_t kept = group.kept(k);
    if (kept <= 0) continue;
    Cut low = bracket.low[i], high = bracket.high[i];
    int64_t surely = counts.above[i], rank = 0;
    if (group.rule().all_ties) {
      if (counts.above[i] < kept && kept <= counts.kept[i]) continue;  // the threshold is the bracket's top
      if (counts.above[i] >= kept && counts.kept[i] > 0) return false;
      surely = counts.kept[i];
    }
    switch (judge(kept, low, high, surely, counts.opened[i], &(*cuts)[i], &rank)) {
      case Verdict::decided: break;
      case Verdict::missed: return false;
      case Verdict::search:
        searches.push_back({k, rank, counts.opened[i], low.magnitude, std::min(high.magnitude, uint64_t(WorkTraits<Work>::infinity) + 1), 0, {}});
    }
  }
  Selection<Work> selection(group, crew, store, bracket);
  auto settled = [](const Search& s) { return s.count <= kGatherable || s.low == s.high; };
  for (;;) {
    std::vector<Search> open;
    std::copy_if(searches.begin(), searches.end(), std::back_inserter(open), [&](auto& s) { return !settled(s); });
    if (open.empty()) break;
    selection.narrow(open);
    for (Search& s : open)
      *std::find_if(searches.begin(), searches.end(), [&](auto& old) { return old.expert == s.expert; }) = s;
  }
  std::vector<Search> small;
  for (const Search& s : searches) {
    if (s.count <= kGatherable)
      small.push_back(s);
    else
      (*cuts)[size_t(s.expert)] = group.rule().all_ties ? Cut{s.low, 0} : selection.nth_equal(s);
  }
  if (!small.empty()) selection.gather(small, cuts);
  if (group.rule().all_ties)
    for (const Search& s : searches) (*cuts)[size_t(s.expert)].index = Cut::kAllIndices;
  return true;
}

template bool select_cuts(const Group<float>&, Crew&, UndecidedStore&, const Bracket&, const Counts&, std::vector<Cut>*);
template bool select_cuts(const Group<double>&, Crew&, UndecidedStore&, const Bracket&, const Counts&, std::vector<Cut>*);

}  // namespace pm
