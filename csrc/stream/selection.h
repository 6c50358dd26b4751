// Order statistics of the undecided entries, in memory that does not grow with their number.
#pragma once
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "merge.h"

namespace pm {

// Looks for the `rank`-th largest of one expert's undecided keys, among those with magnitude in [low, high].
struct Search {
  int expert;
  int64_t rank, count;
  uint64_t low, high;
  int64_t larger = 0;                    // undecided keys above `high`: the rank so far passed over
  size_t answer = 0;                     // where the result belongs
  int shift = 0;
  std::vector<std::vector<int64_t>> bins;  // per crew member
};

// The key found, and how the undecided lie around it.
struct Placed {
  Cut cut;  // exactly `rank` undecided entries reach it
  int64_t rank = 0, larger = 0, equal = 0;
};

template <class Work>
class Selection {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  Selection(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Bracket& bracket)
      : group_(group), crew_(crew), store_(store), bracket_(bracket) {}

  // A search over all that is undecided for expert k.
  Search search(int k, int64_t rank, int64_t count) const {
    const uint64_t low = bracket_.low[size_t(k)].magnitude, high = bracket_.high[size_t(k)].magnitude;
    return {k, rank, count, low, std::min<uint64_t>(high, WorkTraits<Work>::nan_key), 0, 0, 0, {}};
  }

  // Answers in the order of the searches.
  std::vector<Placed> find(std::vector<Search> searches) {
    std::vector<Placed> answers(searches.size());
    for (size_t i = 0; i < searches.size(); ++i) searches[i].answer = i;
    while (!searches.empty()) {
      const auto large = [](const Search& s) { return s.count > kGatherable; };
      const auto spread = [](const Search& s) { return s.low != s.high; };
      const auto few = std::partition(searches.begin(), searches.end(), large);
      const auto same = std::partition(searches.begin(), few, spread);
      if (few != searches.end()) gather({few, searches.end()}, &answers);
      if (same != few) place_equal({same, few}, &answers);
      searches.erase(same, searches.end());
      if (!searches.empty()) narrow(searches);
    }
    return answers;
  }

 private:
  static constexpr int64_t kBins = 4096;           // per narrowing step
  static constexpr int64_t kGatherable = 1 << 12;  // candidates of one search that are sorted out directly

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
  struct Candidate {
    uint64_t key, index;
    bool operator<(const Candidate& other) const {
      return key != other.key ? key > other.key : index < other.index;
    }
  };
  struct SpanCount {
    uint64_t first;  // flat index of the span's first undecided element
    int64_t count, chunk;
    size_t span;
    bool operator<(const SpanCount& other) const { return first < other.first; }
  };

  // What every member found for every search.
  template <class T>
  struct Finds {
    std::vector<std::vector<T>> lists;
    size_t searches;
    Finds(int members, size_t searches) : lists(size_t(members) * searches), searches(searches) {}
    std::vector<T>& at(int member, size_t search) { return lists[size_t(member) * searches + search]; }
    std::vector<T> all(size_t search) const {
      std::vector<T> joined;
      for (size_t i = search; i < lists.size(); i += searches)
        joined.insert(joined.end(), lists[i].begin(), lists[i].end());
      return joined;
    }
  };

  [[noreturn]] static void miscounted() {
    throw std::logic_error("fewer undecided keys than were counted");
  }

  void narrow(std::vector<Search>& searches) {
    for (Search& s : searches) {
      s.shift = 0;
      while (((s.high - s.low) >> s.shift) >= uint64_t(kBins)) ++s.shift;
      s.bins.assign(size_t(crew_.size()), std::vector<int64_t>(size_t(kBins)));
    }
    each_chunk(searches, [&](Search& s, const Found& found) {
      std::vector<int64_t>& bins = s.bins[size_t(found.member)];
      for (int64_t i = 0; i < found.count; ++i) ++bins[size_t((found.key[i] - s.low) >> s.shift)];
    });
    for (Search& s : searches) {
      auto total = [&s](size_t bin) {
        return std::accumulate(s.bins.begin(), s.bins.end(), int64_t(0),
                               [bin](int64_t sum, auto& b) { return sum + b[bin]; });
      };
      size_t bin = size_t(kBins);
      while ((s.count = total(--bin)) < s.rank) {
        s.rank -= s.count, s.larger += s.count;
        if (bin == 0) miscounted();
      }
      s.low += uint64_t(bin) << s.shift;
      s.high = std::min(s.high, s.low + (uint64_t(1) << s.shift) - 1);
    }
  }

  void gather(std::vector<Search> searches, std::vector<Placed>* answers) {
    Finds<Candidate> finds(crew_.size(), searches.size());
    each_chunk(searches, [&](const Search& s, const Found& here) {
      auto& list = finds.at(here.member, size_t(&s - searches.data()));
      for (int64_t i = 0; i < here.count; ++i) list.push_back({here.key[i], here.index(i)});
    });
    for (size_t i = 0; i < searches.size(); ++i) {
      const Search& s = searches[i];
      std::vector<Candidate> all = finds.all(i);
      if (int64_t(all.size()) < s.rank) miscounted();
      const auto nth = all.begin() + (s.rank - 1);
      std::nth_element(all.begin(), nth, all.end());
      Placed& answer = (*answers)[s.answer];
      answer.cut = {nth->key, nth->index + 1};
      answer.rank = s.larger + s.rank, answer.larger = s.larger;
      for (const Candidate& c : all) answer.larger += c.key > nth->key, answer.equal += c.key == nth->key;
    }
  }

  // Keys that are all equal need no sorting: they are counted per span, and one span holds the last kept.
  void place_equal(std::vector<Search> searches, std::vector<Placed>* answers) {
    Finds<SpanCount> finds(crew_.size(), searches.size());
    each_chunk(searches, [&](const Search& s, const Found& found) {
      if (found.count)
        finds.at(found.member, size_t(&s - searches.data()))
            .push_back({found.index(0), found.count, found.chunk, found.span});
    });
    const int member = crew_.size() - 1;
    Worker& worker = group_.run().workers[size_t(member)];
    for (size_t i = 0; i < searches.size(); ++i) {
      std::vector<SpanCount> counts = finds.all(i);
      std::sort(counts.begin(), counts.end());
      int64_t rank = searches[i].rank;
      auto it = counts.begin();
      for (; it != counts.end() && it->count < rank; ++it) rank -= it->count;
      if (it == counts.end()) miscounted();
      std::vector<Search> one{searches[i]};
      visit(worker, member, it->chunk, one, [&](const Search& s, const Found& found) {
        if (found.span == it->span)
          (*answers)[s.answer] = {
              {s.low, found.index(rank - 1) + 1}, s.larger + s.rank, s.larger, s.count};
      });
    }
  }

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
    const Cut &low = bracket_.low[size_t(s.expert)], &high = bracket_.high[size_t(s.expert)];
    OpenKeys<Bits> to{keys, rows, 0, 0};
    each_segment({{&low, 1}, {&high, 1}}, flat, span.size, [&](int64_t first, int64_t size) {
      const auto begin =
          std::lower_bound(position + span.begin, position + span.end, uint32_t(first)) - position;
      const auto end =
          std::lower_bound(position + begin, position + span.end, uint32_t(first + size)) - position;
      const Bits from = std::max(threshold_at<Bits>(low, flat + uint64_t(first)), Bits(s.low));
      const Bits below = std::min(threshold_at<Bits>(high, flat + uint64_t(first)), above<Bits>(s.high));
      const int64_t offset = begin * layout.item;
      to.origin = uint32_t(begin);
      group_.kernels(view).open_keys(layout.base(slab) + offset, layout.expert(slab, s.expert) + offset,
                                     end - begin, from, below, &to);
    });
    return {keys, rows, position, flat, to.size, 0, 0, 0};
  }

  const Group<Work>& group_;
  Crew& crew_;
  const UndecidedStore& store_;
  const Bracket& bracket_;
};

}  // namespace pm
