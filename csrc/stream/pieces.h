// The pieces of a group in the order of a round, with the reading of what follows asked for ahead.
#pragma once
#include <algorithm>

#include "../core/rounds.h"
#include "group.h"

namespace pm {

template <class Work>
void read_ahead(const Group<Work>& group, const Rounds& rounds, int round, int64_t tile, int64_t place) {
  constexpr int64_t kWindow = 32;  // pieces: 2 MiB of each bf16 input at the default tile
  if (place % kWindow) return;
  const int64_t end = std::min(place + 2 * kWindow, rounds.places(round));
  typename Group<Work>::Piece range{0, 0, 0};
  for (int64_t next = place ? place + kWindow : 0; next < end; ++next) {
    const int64_t number = rounds.piece(round, next);
    if (number >= rounds.pieces()) break;
    const auto piece = group.piece(number, tile);
    // A gap of a piece is what an earlier round has read: to ask for it again costs nothing.
    const bool joins = piece.tensor == range.tensor && piece.first <= range.first + range.count + tile;
    if (range.count && !joins) group.views[range.tensor].will_need(range.first, range.count);
    range = joins && range.count ? range : piece;
    range.count = piece.first + piece.count - range.first;
  }
  if (range.count) group.views[range.tensor].will_need(range.first, range.count);
}

// body(member, place, piece) for every piece of a round.
template <class Work, class F>
void each_piece(const Group<Work>& group, Crew& crew, const Rounds& rounds, int round, int64_t tile,
                F&& body) {
  crew.each(rounds.places(round), [&](int member, int64_t place) {
    read_ahead(group, rounds, round, tile, place);
    const int64_t number = rounds.piece(round, place);
    if (number < rounds.pieces()) body(member, place, group.piece(number, tile));
  });
}

}  // namespace pm
