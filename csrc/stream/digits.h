// Ranks among many keys, exactly: counting passes by digits until one value is left, then the place of its
// ties.
#pragma once
#include <bit>
#include <functional>
#include <span>

#include "../core/cut.h"
#include "../cpu/parallel.h"

namespace pm {

// One rank that is looked for, and what is known of the key that has it.
struct RankSearch {
  int64_t rank;         // 1-based, descending, among keys that share the prefix
  uint64_t prefix = 0;  // the key's leading bits
  int64_t sharing = 0;  // how many keys share the prefix
};

template <class Bits>
class DigitSearch {
 public:
  // body(search, keys): the keys of one piece that a search is about, in flat order.
  using Body = std::function<void(size_t search, std::span<const Bits> keys)>;
  // Gives `body` the keys of piece `piece` for every search; with `same_keys` once, as those of search 0.
  using KeysOf = std::function<void(int member, int64_t piece, const Body& body)>;

  // `size`: how many keys there are for a search.
  DigitSearch(Crew& crew, int64_t pieces, int64_t size, size_t searches, KeysOf keys_of, bool same_keys)
      : crew_(crew),
        pieces_(pieces),
        searches_(searches),
        keys_of_(std::move(keys_of)),
        same_keys_(same_keys),
        widest_(same_keys ? std::clamp(int(std::bit_width(uint64_t(size))) - 1, kDigit, kWide) : kDigit) {}

  // The first pass over the keys, which needs no ranks yet: they may depend on what is seen in it.
  void count() {
    next_digit();
    count_digits();
  }

  // Finds the keys of these ranks, as `prefix`; `rank` is what is left of it among the keys equal to that.
  const std::vector<RankSearch>& run(const std::vector<int64_t>& ranks) {
    for (size_t s = 0; s < searches_.size(); ++s) searches_[s].rank = ranks[s];
    choose_digits();
    while (shift_ > 0) {
      next_digit();
      count_digits();
      choose_digits();
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

  // Bits settled per pass. Searches among different keys have tables of their own, which together shall fit
  // in the cache. Where all look through the same keys, the first digit is 16 bits of 31: two passes for
  // three, and hardly any key is left for the second.
  static constexpr int kDigit = 11, kWide = 16;

  void next_digit() {
    digit_ = std::min(widest_, shift_);
    shift_ -= digit_;
  }

  // Two counters for each digit, for keys at even and odd places: one that is raised twice in a row waits
  // for itself.
  struct Counter {
    int64_t count[2];
  };

  void count_digits() {
    const size_t bins = size_t(1) << digit_;
    tables_.assign(size_t(crew_.size()), std::vector<Counter>(bins * searches_.size()));
    owner_.resize(searches_.size());
    for (size_t s = 0; s < searches_.size(); ++s)
      owner_[s] = same_keys_ && s > 0 && searches_[s].prefix == searches_[s - 1].prefix ? owner_[s - 1] : s;
    crew_.each(pieces_, [&](int member, int64_t piece) {
      keys_of_(member, piece, [&](size_t first, std::span<const Bits> keys) {
        for (size_t s = first; s < end(first); ++s)
          if (owner_[s] == s) count_digits(keys, searches_[s].prefix, &tables_[size_t(member)][s * bins]);
      });
    });
  }

  void count_digits(std::span<const Bits> keys, uint64_t prefix, Counter* table) const {
    const Bits digits = Bits((Bits(1) << digit_) - 1);
    const int shift = shift_, shared = shift_ + digit_;
    auto count = [&](const Bits* key, size_t size) {
      for (size_t i = 0; i < size; ++i) ++table[(key[i] >> shift) & digits].count[i & 1];
    };
    if (shared == kBits) return count(keys.data(), keys.size());
    constexpr size_t kBlock = 64;  // 16 took 1.1 of the time over three quartiles
    Bits same[kBlock];
    for (size_t at = 0; at < keys.size(); at += kBlock) {
      const std::span<const Bits> block = keys.subspan(at, std::min(kBlock, keys.size() - at));
      Bits any = 0;
      for (Bits key : block) any |= Bits((key >> shared) == Bits(prefix >> shared));
      if (!any) continue;
      size_t size = 0;
      for (Bits key : block) {  // without a branch: which it takes is as good as random
        same[size] = key;
        size += (key >> shared) == Bits(prefix >> shared);
      }
      count(same, size);
    }
  }

  // Moves each search into the digit that its rank lies in.
  void choose_digits() {
    const size_t bins = size_t(1) << digit_;
    for (size_t s = 0; s < searches_.size(); ++s) {
      auto total = [&](size_t bin) {
        int64_t sum = 0;
        for (const auto& table : tables_) {
          const Counter& counter = table[owner_[s] * bins + bin];
          sum += counter.count[0] + counter.count[1];
        }
        return sum;
      };
      size_t bin = bins - 1;
      for (int64_t here; (here = total(bin)) < searches_[s].rank; --bin) searches_[s].rank -= here;
      searches_[s].prefix |= uint64_t(bin) << shift_;
      searches_[s].sharing = total(bin);
    }
  }

  static constexpr int kBits = int(sizeof(Bits)) * 8 - 1;  // the sign bit is clear

  Crew& crew_;
  int64_t pieces_;
  std::vector<RankSearch> searches_;
  KeysOf keys_of_;
  bool same_keys_;
  int widest_, digit_ = 0;                    // bits of a digit: at most, and of the one at hand
  int shift_ = kBits;                         // bits below the digit at hand
  std::vector<std::vector<Counter>> tables_;  // of each member: of each search
  std::vector<size_t> owner_;                 // whose table a search has: that of an equal one before
};

}  // namespace pm
