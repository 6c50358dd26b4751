// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) over lanes.
#pragma once
#include "dtype.h"

namespace pm {

// One 32-bit word per lane; SIMD headers provide the same three operations for their own word vectors.
struct WideProduct32 {
  uint32_t high, low;
};
PM_HD WideProduct32 multiply_wide(uint32_t a, uint32_t m) {
  const uint64_t product = uint64_t(a) * m;
  return {uint32_t(product >> 32), uint32_t(product)};
}

constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;  // from one round's keys to the next
constexpr int kRounds = 10;

template <class Word, class Key>
PM_HD void philox_round(Word (&c)[4], Key key0, Key key1) {
  const auto p0 = multiply_wide(c[0], 0xD2511F53u);
  const auto p1 = multiply_wide(c[2], 0xCD9E8D57u);
  const Word next0 = p1.high ^ c[1] ^ key0, next2 = p0.high ^ c[3] ^ key1;
  c[0] = next0;
  c[1] = p1.low;
  c[2] = next2;
  c[3] = p0.low;
}

// counter -> four random words, in place. Word w of the block for counter c belongs to element 4c + w.
PM_HD void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round, key0 += kKeyStep0, key1 += kKeyStep1)
    philox_round(c, key0, key1);
}

// The same with the keys of all rounds made before, once for many counters.
template <class Key>
struct RoundKeys {
  Key key0[kRounds], key1[kRounds];
};
template <class Word, class Key>
PM_HD void philox(Word (&c)[4], const RoundKeys<Key>& keys) {
#pragma GCC unroll 10
  for (int round = 0; round < kRounds; ++round) philox_round(c, keys.key0[round], keys.key1[round]);
}

}  // namespace pm
