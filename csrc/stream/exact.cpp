// The exact route: count keys by digits over whole passes until one value is left, then place its ties.
#include <algorithm>
#include <mutex>

#include "merge.h"

namespace pm {

namespace {

constexpr int kDigit = 11;  // bits settled per pass: a table of 2,048 counters per expert and worker

template <class Work>
class ExactSearch {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  ExactSearch(const Group<Work>& group, Crew& crew)
      : group_(group), crew_(crew), tile_(group.run().settings.tile) {
    cuts_.assign(size_t(group.cuts()), Cut::keep_all());
    for (int cut = 0; cut < group.cuts(); ++cut) {
      if (group.rank(cut) == 0) cuts_[size_t(cut)] = Cut::keep_none();
      if (group.rank(cut) > 0) searches_.push_back({cut, group.rank(cut), 0, 0});
    }
  }

  std::vector<Cut> run() {
    int shift = int(sizeof(Bits)) * 8 - 1;  // the sign bit is clear
    while (shift > 0) {
      const int digit = std::min(kDigit, shift);
      shift -= digit;
      settle_digit(shift, digit);
    }
    for (const Search& s : searches_) cuts_[size_t(s.cut)] = {s.prefix, Cut::kAllIndices};
    if (!group_.rule().all_ties) place_ties();
    return cuts_;
  }

 private:
  struct Search {
    int cut;
    int64_t rank;     // among keys that share the prefix
    uint64_t prefix;  // the threshold's leading bits
    int64_t equal;    // how many keys share it
  };

  // body(search number, piece number, keys, count) for every piece of every searched expert.
  template <class F>
  void each_keys(F&& body) {
    crew_.each(group_.piece_count(tile_), [&](int member, int64_t number) {
      Worker& worker = group_.run().workers[size_t(member)];
      const auto piece = group_.piece(number, tile_);
      const JobView& view = group_.views[piece.tensor];
      view.load(worker, piece.first, piece.count);
      std::vector<Bits> keys(static_cast<size_t>(piece.count));
      for (size_t s = 0; s < searches_.size(); ++s) {
        group_.kernels(view).keys(worker.tile.base,
                                  worker.tile.expert[size_t(group_.expert_of(searches_[s].cut))], piece.count,
                                  keys.data());
        body(member, s, number, keys);
      }
    });
  }

  void settle_digit(int shift, int digit) {
    const size_t bins = size_t(1) << digit;
    std::vector<std::vector<int64_t>> tables(size_t(crew_.size()),
                                             std::vector<int64_t>(bins * searches_.size()));
    each_keys([&](int member, size_t s, int64_t, const std::vector<Bits>& keys) {
      int64_t* table = &tables[size_t(member)][s * bins];
      const uint64_t prefix = searches_[s].prefix >> digit >> shift;
      for (uint64_t key : keys)
        if (key >> digit >> shift == prefix) ++table[(key >> shift) & (bins - 1)];
    });
    for (size_t s = 0; s < searches_.size(); ++s) {
      Search& search = searches_[s];
      auto total = [&](size_t bin) {
        int64_t sum = 0;
        for (const auto& table : tables) sum += table[s * bins + bin];
        return sum;
      };
      size_t bin = bins - 1;
      int64_t here;
      for (; (here = total(bin)) < search.rank; --bin) search.rank -= here;
      search.prefix |= uint64_t(bin) << shift;
      search.equal = here;
    }
  }

  // Of the keys equal to the threshold the first `rank` are kept: count per piece, then look into one piece.
  void place_ties() {
    const int64_t pieces = group_.piece_count(tile_);
    std::vector<int64_t> equal(size_t(pieces) * searches_.size());
    each_keys([&](int, size_t s, int64_t number, const std::vector<Bits>& keys) {
      equal[size_t(number) * searches_.size() + s] =
          std::count(keys.begin(), keys.end(), Bits(searches_[s].prefix));
    });
    Worker& worker = group_.run().workers[size_t(crew_.size() - 1)];
    for (size_t s = 0; s < searches_.size(); ++s) {
      int64_t rank = searches_[s].rank, number = 0;
      for (; equal[size_t(number) * searches_.size() + s] < rank; ++number)
        rank -= equal[size_t(number) * searches_.size() + s];
      const auto piece = group_.piece(number, tile_);
      const JobView& view = group_.views[piece.tensor];
      view.load(worker, piece.first, piece.count);
      std::vector<Bits> keys(static_cast<size_t>(piece.count));
      group_.kernels(view).keys(worker.tile.base,
                                worker.tile.expert[size_t(group_.expert_of(searches_[s].cut))], piece.count,
                                keys.data());
      int64_t last = -1;
      while (rank > 0) rank -= keys[size_t(++last)] == searches_[s].prefix;
      cuts_[size_t(searches_[s].cut)].index = group_.flat(piece.tensor, piece.first + last) + 1;
    }
  }

  const Group<Work>& group_;
  Crew& crew_;
  int64_t tile_;
  std::vector<Search> searches_;
  std::vector<Cut> cuts_;
};

}  // namespace

template <class Work>
std::vector<Cut> exact_cuts(const Group<Work>& group, Crew& crew) {
  return ExactSearch<Work>(group, crew).run();
}

template std::vector<Cut> exact_cuts(const Group<float>&, Crew&);
template std::vector<Cut> exact_cuts(const Group<double>&, Crew&);

}  // namespace pm
