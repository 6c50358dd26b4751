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

// counter -> four random words, in place. Word w of the block for counter c belongs to element 4c + w.
template <class Word>
PM_HD void philox(Word (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const auto p0 = multiply_wide(c[0], 0xD2511F53u);
    const auto p1 = multiply_wide(c[2], 0xCD9E8D57u);
    const Word next0 = p1.high ^ c[1] ^ key0, next2 = p0.high ^ c[3] ^ key1;
    c[0] = next0;
    c[1] = p1.low;
    c[2] = next2;
    c[3] = p0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace pm
