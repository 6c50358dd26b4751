// Ranks among many keys, exactly: counting passes by digits until one value is left, then the place of its
// ties.
#pragma once
#include <functional>
#include <span>

#include "../core/cut.h"
#include "../cpu/parallel.h"

namespace pm {

// One rank that is looked for, and what is known of the key that has it.
struct RankSearch {
  int64_t rank;         // 1-based, descending, among keys that share the prefix
  uint64_t prefix = 0;  // the key's leading bits
};

template <class Bits>
class DigitSearch {
 public:
  // body(search, keys): the keys of one piece that a search is about, in flat order.
  using Body = std::function<void(size_t search, std::span<const Bits> keys)>;
  // Gives `body` the keys of piece `piece` for every search; with `same_keys` once, as those of search 0.
  using KeysOf = std::function<void(int member, int64_t piece, const Body& body)>;

  DigitSearch(Crew& crew, int64_t pieces, std::vector<RankSearch> searches, KeysOf keys_of, bool same_keys)
      : crew_(crew),
        pieces_(pieces),
        searches_(std::move(searches)),
        keys_of_(std::move(keys_of)),
        same_keys_(same_keys) {}

  // Finds the keys, as `prefix`; `rank` is what is left of it among keys equal to that.
  const std::vector<RankSearch>& run() {
    int shift = int(sizeof(Bits)) * 8 - 1;  // the sign bit is clear
    while (shift > 0) {
      const int digit = std::min(kDigit, shift);
      shift -= digit;
      settle_digit(shift, digit);
    }
    return searches_;
  }

  // Of the keys equal to the one found, where the last that counts is: its piece, and its place therein.
  struct Place {
    int64_t piece, at;
  };
  std::vector<Place> places() {
    std::vector<int64_t> equal(size_t(pieces_) * searches_.size());
    crew_.each(pieces_, [&](int member, int64_t piece) {
      keys_of_(member, piece, [&](size_t first, std::span<const Bits> keys) {
        for (size_t s = first; s < end(first); ++s)
          equal[size_t(piece) * searches_.size() + s] =
              std::count(keys.begin(), keys.end(), Bits(searches_[s].prefix));
      });
    });
    std::vector<Place> found(searches_.size());
    for (size_t s = 0; s < searches_.size(); ++s) {
      int64_t rank = searches_[s].rank, piece = 0;
      for (; equal[size_t(piece) * searches_.size() + s] < rank; ++piece)
        rank -= equal[size_t(piece) * searches_.size() + s];
      int64_t last = -1;
      keys_of_(crew_.size() - 1, piece, [&](size_t first, std::span<const Bits> keys) {
        if (s < first || s >= end(first)) return;
        while (rank > 0) rank -= keys[size_t(++last)] == searches_[s].prefix;
      });
      found[s] = {piece, last};
    }
    return found;
  }

 private:
  // The searches that keys given to `first` are for.
  size_t end(size_t first) const { return same_keys_ ? searches_.size() : first + 1; }

  static constexpr int kDigit = 11;  // bits settled per pass: 2,048 counters per search and worker

  void settle_digit(int shift, int digit) {
    const size_t bins = size_t(1) << digit;
    std::vector<std::vector<int64_t>> tables(size_t(crew_.size()),
                                             std::vector<int64_t>(bins * searches_.size()));
    std::vector<size_t> owner(searches_.size());  // whose table: that of an equal search before
    for (size_t s = 0; s < owner.size(); ++s)
      owner[s] = same_keys_ && s > 0 && searches_[s].prefix == searches_[s - 1].prefix ? owner[s - 1] : s;
    crew_.each(pieces_, [&](int member, int64_t piece) {
      keys_of_(member, piece, [&](size_t first, std::span<const Bits> keys) {
        for (size_t s = first; s < end(first); ++s) {
          if (owner[s] != s) continue;
          int64_t* table = &tables[size_t(member)][s * bins];
          const uint64_t prefix = searches_[s].prefix >> digit >> shift;
          for (uint64_t key : keys)
            if (key >> digit >> shift == prefix) ++table[(key >> shift) & (bins - 1)];
        }
      });
    });
    for (size_t s = 0; s < searches_.size(); ++s) {
      auto total = [&](size_t bin) {
        int64_t sum = 0;
        for (const auto& table : tables) sum += table[owner[s] * bins + bin];
        return sum;
      };
      size_t bin = bins - 1;
      for (int64_t here; (here = total(bin)) < searches_[s].rank; --bin) searches_[s].rank -= here;
      searches_[s].prefix |= uint64_t(bin) << shift;
    }
  }

  Crew& crew_;
  int64_t pieces_;
  std::vector<RankSearch> searches_;
  KeysOf keys_of_;
  bool same_keys_;
};

}  // namespace pm
