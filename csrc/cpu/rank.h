// Keys of a row and the bins they fall in, for ranks in rows.
#pragma once
#include "stats.h"

namespace pm {

template <class V, class T>
struct RankKernel {
  using Work = typename T::Work;
  using Bits = typename WorkTraits<Work>::Bits;
  static constexpr int kElements = V::width * kGroup;

  // As StatsKernel::keys; returns the largest.
  static Bits row_keys(const void* base, const void* expert, int64_t count, Bits* key) {
    Bits most[kElements] = {};
    StatsKernel<V, T>::each_group(base, expert, count, [&](const V(&d)[kGroup], int64_t at, int n) {
      Bits bits[kElements];
      StatsKernel<V, T>::group_keys(d, bits);
      for (int j = 0; j < kElements; ++j) most[j] = std::max(most[j], bits[j]);
      std::copy(bits, bits + n, key + at);
    });
    return *std::max_element(most, most + kElements);
  }

  // bin[i]: 0 for a zero, else the leading bits of a key less `offset`, plus 1; 1 where they are below it.
  // loose[i]: whether the bin does not tell the key.
  static void bins(const Bits* key, int64_t count, int shift, Bits offset, uint16_t* bin, uint8_t* loose) {
    const Bits rest = (Bits(1) << shift) - 1;
    for (int64_t i = 0; i < count; ++i) {
      const Bits leading = key[i] >> shift;
      const Bits number = std::max<Bits>(leading, offset) - offset + 1;
      bin[i] = uint16_t(key[i] == 0 ? 0 : number);
      loose[i] = uint8_t((key[i] != 0) & (((key[i] & rest) != 0) | (leading < offset)));
    }
  }
};

}  // namespace pm
