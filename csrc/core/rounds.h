// The order in which a group's pieces are streamed. A scattered few come first, then a few times as many as
// so far, and so on: after each round the bracket can be narrowed for the rest.
#pragma once
#include "dtype.h"

namespace pm {

PM_HD uint64_t scatter(uint64_t x) {  // splitmix64: any fixed scattering will do, no result depends on it
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Each block of 2^growth pieces spares one for an earlier round, each block of 2^growth such blocks again,
// ...
class Rounds {
 public:
  static Rounds in_order(int64_t pieces) { return Rounds(pieces, 2, 0); }
  static Rounds scattered_first(int64_t pieces, int growth) {
    int depth = 0;
    while (pieces >> (growth * (depth + 1)) >= kFewest) ++depth;
    return Rounds(pieces, growth, depth);
  }

  PM_HD int count() const { return depth_ + 1; }
  PM_HD int64_t pieces() const { return pieces_; }
  // Places of a round; a few at the end may hold no piece.
  PM_HD int64_t places(int round) const {
    return round == 0 ? blocks(depth_) : (fan() - 1) * blocks(depth_ - round + 1);
  }
  // The piece at a place, ascending within the round; at least pieces() if there is none.
  PM_HD int64_t piece(int round, int64_t place) const {
    int level = depth_;
    if (round > 0) {
      level = depth_ - round;
      const int64_t others = fan() - 1, block = place / others, child = place % others;
      place = fan() * block + child + (child >= spared(level + 1, block));
    }
    for (; level > 0; --level) place = fan() * place + spared(level, place);
    return place;
  }

 private:
  static constexpr int64_t kFewest = 16;  // pieces in the first round: fewer say little about the spread

  Rounds(int64_t pieces, int growth, int depth) : pieces_(pieces), growth_(growth), depth_(depth) {}
  PM_HD int64_t fan() const { return int64_t(1) << growth_; }
  PM_HD int64_t blocks(int level) const {
    return (pieces_ + (int64_t(1) << (growth_ * level)) - 1) >> (growth_ * level);
  }
  PM_HD int64_t spared(int level, int64_t block) const {
    return int64_t(scatter(uint64_t(block) * 64 + uint64_t(level)) & uint64_t(fan() - 1));
  }

  int64_t pieces_;
  int growth_, depth_;
};

}  // namespace pm
