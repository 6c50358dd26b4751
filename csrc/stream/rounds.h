// The order in which a group's pieces are streamed. A scattered few come first, then three times as many as
// so far, and so on: after each round the bracket can be narrowed for the rest.
#pragma once
#include <algorithm>
#include <cstdint>

namespace pm {

inline uint64_t scatter(uint64_t x) {  // splitmix64: any fixed scattering will do, no result depends on it
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Each block of four pieces leaves one to an earlier round, each block of four such blocks again, ...
class Rounds {
 public:
  static Rounds in_order(int64_t pieces) { return Rounds(pieces, 0); }
  static Rounds scattered_first(int64_t pieces) {
    int depth = 0;
    while (pieces >> (2 * depth + 2) >= kFewest) ++depth;
    return Rounds(pieces, depth);
  }

  int count() const { return depth_ + 1; }
  int64_t pieces() const { return pieces_; }
  // Places of a round; a few at the end may hold no piece.
  int64_t places(int round) const { return round == 0 ? blocks(depth_) : 3 * blocks(depth_ - round + 1); }
  // The piece at a place, ascending within the round; at least pieces() if there is none.
  int64_t piece(int round, int64_t place) const {
    int level = depth_;
    if (round > 0) {
      level = depth_ - round;
      const int64_t block = place / 3, left_out = spared(level + 1, block);
      place = 4 * block + place % 3 + (place % 3 >= left_out);
    }
    for (; level > 0; --level) place = 4 * place + spared(level, place);
    return place;
  }

 private:
  static constexpr int64_t kFewest = 16;  // pieces in the first round: fewer say little about the spread

  Rounds(int64_t pieces, int depth) : pieces_(pieces), depth_(depth) {}
  int64_t blocks(int level) const { return (pieces_ + (int64_t(1) << (2 * level)) - 1) >> (2 * level); }
  static int64_t spared(int level, int64_t block) {
    return int64_t(scatter(uint64_t(block) * 64 + uint64_t(level)) & 3);
  }

  int64_t pieces_;
  int depth_;
};

}  // namespace pm
