// The exact threshold of each expert from the undecided positions, in memory that does not grow with them.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "merge.h"

namespace pm {

namespace {

constexpr int64_t kBins = 4096;           // per narrowing step
constexpr int64_t kGatherable = 1 << 12;  // candidates of one expert that are sorted out directly

// One expert's search: the `rank`-th largest among undecided keys with magnitude in [low, high].
struct Search {
  int expert;
  int64_t rank, count;
  uint64_t low, high;
  int shift = 0;
  std::vector<std::vector<int64_t>> bins;  // per crew member

  void prepare(int members) {
    shift = 0;
    while (((high - low) >> shift) >= uint64_t(kBins)) ++shift;
    bins.assign(size_t(members), std::vector<int64_t>(size_t(kBins)));
  }
  void narrow() {
    auto total = [this](size_t bin) {
      return std::accumulate(bins.begin(), bins.end(), int64_t(0),
                             [bin](int64_t sum, auto& b) { return sum + b[bin]; });
    };
    size_t bin = size_t(kBins);
    while ((count = total(--bin)) < rank) {
      rank -= count;
      if (bin == 0) throw std::logic_error("fewer undecided keys than were counted");
    }
    low += uint64_t(bin) << shift;
    high = std::min(high, low + (uint64_t(1) << shift) - 1);
  }
};

struct Candidate {
  uint64_t key, index;
  bool operator<(const Candidate& other) const {
    return key != other.key ? key > other.key : index < other.index;
  }
};

template <class Work>
class Selection {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  Selection(const Group<Work>& group, Crew& crew, UndecidedStore& store, const Bracket& bracket)
      : group_(group), crew_(crew), store_(store), bracket_(bracket) {}

  void narrow(std::vector<Search>& searches) {
    for (Search& s : searches) s.prepare(crew_.size());
    each_chunk(searches, [&](Search& s, const Found& found) {
      std::vector<int64_t>& bins = s.bins[size_t(found.member)];
      for (int64_t i = 0; i < found.count; ++i) ++bins[size_t((found.key[i] - s.low) >> s.shift)];
    });
    for (Search& s : searches) s.narrow();
  }

  void gather(std::vector<Search>& searches, std::vector<Cut>* cuts) {
    std::vector<std::vector<Candidate>> found(searches.size());
    std::mutex mutex;
    each_chunk(searches, [&](const Search& s, const Found& here) {
      std::lock_guard lock(mutex);
      auto& list = found[size_t(&s - searches.data())];
      for (int64_t i = 0; i < here.count; ++i) list.push_back({here.key[i], here.index(i)});
    });
    for (size_t i = 0; i < searches.size(); ++i) {
      if (int64_t(found[i].size()) < searches[i].rank)
        throw std::logic_error("fewer undecided keys than were counted");
      const auto nth = found[i].begin() + (searches[i].rank - 1);
      std::nth_element(found[i].begin(), nth, found[i].end());
      (*cuts)[size_t(searches[i].expert)] = {nth->key, nth->index + 1};
    }
  }

  // Keys that are all equal need no sorting: they are counted per span, and one span holds the last kept.
  void place_equal(std::vector<Search>& searches, std::vector<Cut>* cuts) {
    struct SpanCount {
      uint64_t first;  // flat index of the span's first undecided element
      int64_t count, chunk;
      size_t span;
      bool operator<(const SpanCount& other) const { return first < other.first; }
    };
    std::vector<std::vector<SpanCount>> counts(searches.size());
    std::mutex mutex;
    each_chunk(searches, [&](const Search& s, const Found& found) {
      if (!found.count) return;
      std::lock_guard lock(mutex);
      counts[size_t(&s - searches.data())].push_back({found.index(0), found.count, found.chunk, found.span});
    });
    Worker& worker = group_.run().workers[size_t(crew_.size() - 1)];
    for (size_t i = 0; i < searches.size(); ++i) {
      std::sort(counts[i].begin(), counts[i].end());
      int64_t rank = searches[i].rank;
      auto it = counts[i].begin();
      for (; it != counts[i].end() && it->count < rank; ++it) rank -= it->count;
      if (it == counts[i].end()) throw std::logic_error("fewer undecided keys than were counted");
      std::vector<Search> one{searches[i]};
      visit(worker, crew_.size() - 1, it->chunk, one, [&](const Search& s, const Found& found) {
        if (found.span == it->span) (*cuts)[size_t(s.expert)] = {s.low, found.index(rank - 1) + 1};
      });
    }
  }

 private:
  // Undecided keys of one span of one chunk, in flat-index order.
  struct Found {
    const Bits* key;
    const uint32_t *row, *position;
    uint64_t flat;  // of the span's tile
    int64_t count, chunk;
    size_t span;
    int member;
    uint64_t index(int64_t i) const { return flat + position[row[i]]; }
  };

  // body(search, found) for the undecided keys of every search within [low, high], span by span.
  template <class F>
  void each_chunk(std::vector<Search>& searches, F&& body) {
    crew_.each(int64_t(store_.chunks().size()), [&](int member, int64_t number) {
      visit(group_.run().workers[size_t(member)], member, number, searches, body);
    });
  }

  template <class F>
  void visit(Worker& worker, int member, int64_t number, std::vector<Search>& searches, F&& body) {
    const Chunk& chunk = *store_.chunks()[size_t(number)];
    if (chunk.size == 0) return;
    char* slab = store_.open(chunk, worker);
    const size_t room = size_t(chunk.size + kMaxGroup);
    Bits* keys = worker.wide.reserve_for<Bits>(room);
    uint32_t* rows = worker.cast.reserve_for<uint32_t>(room);
    for (Search& s : searches)
      for (size_t i = 0; i < chunk.spans.size(); ++i) {
        Found found = open_keys(chunk.spans[i], slab, s, keys, rows);
        found.chunk = number, found.span = i, found.member = member;
        body(s, found);
      }
  }

  Found open_keys(const Span& span, char* slab, const Search& s, Bits* keys, uint32_t* rows) {
    const ChunkLayout& layout = store_.layout();
    const uint32_t* position = layout.position(slab);
    const JobView& view = group_.views[size_t(span.tensor)];
    const uint64_t flat = group_.flat(size_t(span.tensor), span.origin);
    const std::vector<Cut> low{bracket_.low[size_t(s.expert)]}, high{bracket_.high[size_t(s.expert)]};
    OpenKeys<Bits> to{keys, rows, 0, 0};
    each_segment({&low, &high}, flat, span.size, [&](int64_t first, int64_t size) {
      const auto begin =
          std::lower_bound(position + span.begin, position + span.end, uint32_t(first)) - position;
      const auto end =
          std::lower_bound(position + begin, position + span.end, uint32_t(first + size)) - position;
      const Bits from = std::max(threshold_at<Bits>(low[0], flat + uint64_t(first)), Bits(s.low));
      const Bits below = std::min(threshold_at<Bits>(high[0], flat + uint64_t(first)), above<Bits>(s.high));
      const int64_t offset = begin * layout.item;
      to.origin = uint32_t(begin);
      group_.kernels(view).open_keys(layout.base(slab) + offset, layout.expert(slab, s.expert) + offset,
                                     end - begin, from, below, &to);
    });
    return {keys, rows, position, flat, to.size, 0, 0, 0};
  }

  const Group<Work>& group_;
  Crew& crew_;
  UndecidedStore& store_;
  const Bracket& bracket_;
};

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
        searches.push_back({k,
                            rank,
                            counts.opened[i],
                            low.magnitude,
                            std::min(high.magnitude, uint64_t(WorkTraits<Work>::infinity) + 1),
                            0,
                            {}});
    }
  }
  Selection<Work> selection(group, crew, store, bracket);
  auto small = [](const Search& s) { return s.count <= kGatherable; };
  auto equal = [&](const Search& s) { return s.low == s.high && !small(s); };
  auto take = [&](auto&& test) {
    std::vector<Search> taken;
    std::copy_if(searches.begin(), searches.end(), std::back_inserter(taken), test);
    std::erase_if(searches, test);
    return taken;
  };
  while (!searches.empty()) {
    if (auto few = take(small); !few.empty()) selection.gather(few, cuts);
    if (auto same = take(equal); !same.empty()) selection.place_equal(same, cuts);
    if (!searches.empty()) selection.narrow(searches);
  }
  if (group.rule().all_ties)
    for (Cut& cut : *cuts)
      if (cut.magnitude != Cut::keep_none().magnitude) cut.index = Cut::kAllIndices;
  return true;
}

template bool select_cuts(const Group<float>&, Crew&, UndecidedStore&, const Bracket&, const Counts&,
                          std::vector<Cut>*);
template bool select_cuts(const Group<double>&, Crew&, UndecidedStore&, const Bracket&, const Counts&,
                          std::vector<Cut>*);

}  // namespace pm
