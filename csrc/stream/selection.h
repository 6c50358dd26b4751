// Order statistics of the undecided entries, in memory that does not grow with their number.
#pragma once
#include <algorithm>
#include <functional>
#include <stdexcept>

#include "../core/bracket.h"
#include "merge.h"

namespace pm {

// Magnitudes [low, high] of one cut's expert.
struct Range {
  int cut;
  uint64_t low, high;
  bool operator==(const Range&) const = default;
};

// Looks for the `rank`-th largest of the undecided keys in a range.
struct Search {
  Range range;
  int64_t rank, count;  // count: how many keys lie in the range
  int64_t larger = 0;   // undecided keys above the range: ranks passed over
  size_t answer = 0;    // where the result belongs
};

template <class Work>
class Selection {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  Selection(const Group<Work>& group, Crew& crew, const UndecidedStore& store, const Bracket& bracket)
      : group_(group), crew_(crew), store_(store), bracket_(bracket) {}

  // A search over all that is undecided about a cut.
  Search search(int cut, int64_t rank, int64_t count) const {
    const uint64_t low = bracket_.low[size_t(cut)].magnitude, high = bracket_.high[size_t(cut)].magnitude;
    return {{cut, low, std::min<uint64_t>(high, WorkTraits<Work>::nan_key)}, rank, count};
  }

  // Answers in the order of the searches.
  std::vector<Placed> find(std::vector<Search> searches) {
    std::vector<Placed> answers(searches.size());
    for (size_t i = 0; i < searches.size(); ++i) searches[i].answer = i;
    while (!searches.empty()) {
      const int64_t gatherable = std::min(kGatherable, kCandidates / group_.experts());
      const auto large = [gatherable](const Search& s) { return s.count > gatherable; };
      const auto spread = [](const Search& s) { return s.range.low != s.range.high; };
      const auto few = std::stable_partition(searches.begin(), searches.end(), large);
      const auto same = std::partition(searches.begin(), few, spread);
      if (few != searches.end()) gather({few, searches.end()}, &answers);
      if (same != few) place_equal({same, few}, &answers);
      searches.erase(same, searches.end());
      if (!searches.empty()) narrow(searches);
    }
    return answers;
  }

 private:
  static constexpr int64_t kBins = 4096;  // per narrowing step
  // Candidates that are sorted out directly: of one search, and of all experts. More are counted by bins
  // first (1 M elements: with 1,024 a merge of 8 experts took a fifth longer, with 65,536 a search of one a
  // sixth).
  static constexpr int64_t kGatherable = 1 << 13, kCandidates = 1 << 16;

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
    uint64_t magnitude, index;
    static uint64_t key(const Candidate& c) { return c.magnitude; }
    static bool before(const Candidate& a, const Candidate& b) {
      return a.magnitude != b.magnitude ? a.magnitude > b.magnitude : a.index < b.index;
    }
  };
  struct SpanCount {
    uint64_t first;  // flat index of the span's first undecided element
    int64_t count, chunk;
    size_t span;
    bool operator<(const SpanCount& other) const { return first < other.first; }
  };

  // What every member found in every range.
  template <class T>
  struct Finds {
    std::vector<std::vector<T>> lists;
    size_t ranges;
    Finds(int members, size_t ranges) : lists(size_t(members) * ranges), ranges(ranges) {}
    std::vector<T>& at(int member, size_t range) { return lists[size_t(member) * ranges + range]; }
    std::vector<T> all(size_t range) const {
      std::vector<T> joined;
      for (size_t i = range; i < lists.size(); i += ranges)
        joined.insert(joined.end(), lists[i].begin(), lists[i].end());
      return joined;
    }
  };

  // Searches over one range share what is found in it. Range i is that of searches [first[i], first[i + 1]).
  struct Ranges {
    std::vector<Range> list;
    std::vector<size_t> first;
    explicit Ranges(const std::vector<Search>& searches) {
      for (size_t i = 0; i < searches.size(); ++i) {
        if (i > 0 && searches[i].range == list.back()) continue;
        list.push_back(searches[i].range);
        first.push_back(i);
      }
      first.push_back(searches.size());
    }
  };

  [[noreturn]] static void miscounted() { throw std::logic_error("fewer undecided keys than were counted"); }

  static int bin_shift(const Range& range) {
    int shift = 0;
    while (((range.high - range.low) >> shift) >= uint64_t(kBins)) ++shift;
    return shift;
  }

  // Every range shrinks to the bin that holds the rank.
  void narrow(std::vector<Search>& searches) {
    const Ranges ranges(searches);
    Finds<int64_t> bins(crew_.size(), ranges.list.size());
    for (auto& list : bins.lists) list.resize(size_t(kBins));
    each_chunk(ranges.list, [&](size_t range, const Found& found) {
      const uint64_t low = ranges.list[range].low;
      const int shift = bin_shift(ranges.list[range]);
      int64_t* count = bins.at(found.member, range).data();
      for (int64_t i = 0; i < found.count; ++i) ++count[(found.key[i] - low) >> shift];
    });
    for (size_t range = 0; range < ranges.list.size(); ++range) {
      std::vector<int64_t>& sum = bins.at(0, range);
      for (int member = 1; member < crew_.size(); ++member)
        std::transform(sum.begin(), sum.end(), bins.at(member, range).begin(), sum.begin(), std::plus<>());
      for (size_t i = ranges.first[range]; i < ranges.first[range + 1]; ++i) enter_bin(searches[i], sum);
    }
  }

  static void enter_bin(Search& s, const std::vector<int64_t>& bins) {
    const int shift = bin_shift(s.range);
    size_t bin = bins.size();
    while ((s.count = bins[--bin]) < s.rank) {
      s.rank -= s.count, s.larger += s.count;
      if (bin == 0) miscounted();
    }
    s.range.low += uint64_t(bin) << shift;
    s.range.high = std::min(s.range.high, s.range.low + (uint64_t(1) << shift) - 1);
  }

  void gather(const std::vector<Search>& searches, std::vector<Placed>* answers) {
    const Ranges ranges(searches);
    Finds<Candidate> finds(crew_.size(), ranges.list.size());
    each_chunk(ranges.list, [&](size_t range, const Found& here) {
      auto& list = finds.at(here.member, range);
      for (int64_t i = 0; i < here.count; ++i) list.push_back({here.key[i], here.index(i)});
    });
    crew_.each(int64_t(ranges.list.size()), [&](int member, int64_t range) {
      const std::vector<Candidate> all = finds.all(size_t(range));
      const int64_t size = int64_t(all.size());
      Buffer& memory = group_.run().workers[size_t(member)].words;
      Ranking<Candidate> ranking(size, memory.reserve(Ranking<Candidate>::bytes(size)),
                                 [&all](int64_t i) { return all[size_t(i)]; });
      for (size_t i = ranges.first[size_t(range)]; i < ranges.first[size_t(range) + 1]; ++i) {
        if (size < searches[i].rank) miscounted();
        (*answers)[searches[i].answer] = place(searches[i], ranking);
      }
    });
  }

  static Placed place(const Search& s, Ranking<Candidate>& ranking) {
    const Candidate last = ranking.at(s.rank);
    const auto counts = ranking.around(last.magnitude);
    return {{last.magnitude, last.index + 1}, s.larger + s.rank, s.larger + counts.larger, counts.equal};
  }

  // Keys that are all equal need no sorting: they are counted per span, and one span holds the last kept.
  void place_equal(const std::vector<Search>& searches, std::vector<Placed>* answers) {
    const Ranges ranges(searches);
    Finds<SpanCount> finds(crew_.size(), ranges.list.size());
    each_chunk(ranges.list, [&](size_t range, const Found& found) {
      if (found.count)
        finds.at(found.member, range).push_back({found.index(0), found.count, found.chunk, found.span});
    });
    crew_.each(int64_t(ranges.list.size()), [&](int member, int64_t range) {
      std::vector<SpanCount> counts = finds.all(size_t(range));
      std::sort(counts.begin(), counts.end());
      for (size_t i = ranges.first[size_t(range)]; i < ranges.first[size_t(range) + 1]; ++i)
        (*answers)[searches[i].answer] = place_in_span(searches[i], counts, member);
    });
  }

  Placed place_in_span(const Search& s, const std::vector<SpanCount>& counts, int member) {
    int64_t rank = s.rank;
    auto span = counts.begin();
    for (; span != counts.end() && span->count < rank; ++span) rank -= span->count;
    if (span == counts.end()) miscounted();
    Placed answer{{s.range.low, 0}, s.larger + s.rank, s.larger, s.count};
    visit(member, span->chunk, {s.range}, [&](size_t, const Found& found) {
      if (found.span == span->span) answer.cut.index = found.index(rank - 1) + 1;
    });
    return answer;
  }

  // body(range number, found) for the undecided keys in every range, span by span.
  template <class F>
  void each_chunk(const std::vector<Range>& ranges, F&& body) {
    crew_.each(int64_t(store_.chunks().size()),
               [&](int member, int64_t number) { visit(member, number, ranges, body); });
  }

  template <class F>
  void visit(int member, int64_t number, const std::vector<Range>& ranges, F&& body) {
    Worker& worker = group_.run().workers[size_t(member)];
    const Chunk& chunk = *store_.chunks()[size_t(number)];
    if (chunk.size == 0) return;
    char* slab = store_.open(chunk, worker);
    const size_t room = size_t(chunk.size + kMaxGroup);
    Bits* keys = worker.wide.reserve_for<Bits>(room);
    uint32_t* rows = worker.cast.reserve_for<uint32_t>(room);
    for (size_t range = 0; range < ranges.size(); ++range)
      for (size_t i = 0; i < chunk.spans.size(); ++i) {
        Found found = open_keys(chunk.spans[i], slab, ranges[range], keys, rows);
        found.chunk = number, found.span = i, found.member = member;
        body(range, found);
      }
  }

  Found open_keys(const Span& span, char* slab, const Range& range, Bits* keys, uint32_t* rows) {
    const ChunkLayout& layout = store_.layout();
    const uint32_t* position = layout.position(slab);
    const JobView& view = group_.views[size_t(span.tensor)];
    const uint64_t flat = group_.flat(size_t(span.tensor), span.origin);
    const Cut &low = bracket_.low[size_t(range.cut)], &high = bracket_.high[size_t(range.cut)];
    const int k = group_.expert_of(range.cut);
    OpenKeys<Bits> to{keys, rows, 0, 0};
    each_segment({{&low, 1}, {&high, 1}}, flat, span.size, [&](int64_t first, int64_t size) {
      const auto begin =
          std::lower_bound(position + span.begin, position + span.end, uint32_t(first)) - position;
      const auto end =
          std::lower_bound(position + begin, position + span.end, uint32_t(first + size)) - position;
      const Bits from = std::max(threshold_at<Work>(low, flat + uint64_t(first)), Bits(range.low));
      const Bits below = std::min(threshold_at<Work>(high, flat + uint64_t(first)), above<Work>(range.high));
      const int64_t offset = begin * layout.item;
      to.origin = uint32_t(begin);
      group_.kernels(view).open_keys(layout.base(slab) + offset, layout.expert(slab, k) + offset, end - begin,
                                     from, below, &to);
    });
    return {keys, rows, position, flat, to.size, 0, 0, 0};
  }

  const Group<Work>& group_;
  Crew& crew_;
  const UndecidedStore& store_;
  const Bracket& bracket_;
};

}  // namespace pm
