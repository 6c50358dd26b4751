// AVX-512 lanes (f32 x 16) for processors from Ice Lake and Zen 4 on: F, BW, VL, DQ, VBMI2.
#pragma once
#include <immintrin.h>

#include "../core/lane.h"

namespace pm {

PM_HD void store_line(void* p, __m512i line, bool bypass_cache) {
  if (bypass_cache)
    _mm512_stream_si512(static_cast<__m512i*>(p), line);
  else
    _mm512_storeu_si512(p, line);
}

struct Avx512 {
  using Work = float;
  using Bits = uint32_t;
  using Mask = __mmask16;
  static constexpr int width = 16;
  __m512 x;

  PM_HD static Avx512 set(float value) { return {_mm512_set1_ps(value)}; }
  PM_HD static Mask none() { return 0; }
  PM_HD static Mask all() { return 0xffff; }
  PM_HD static uint32_t mask_bits(__mmask16 m) { return m; }

  // Masks go through memory: storing them costs the vector ports nothing. They are counted when the next
  // group's come, as four short stores must have left the core before they can be loaded as one.
  struct Count {
    uint16_t field[kGroup];
    int64_t sum;
    PM_HD static Count zero() { return {{0, 0, 0, 0}, 0}; }
    PM_HD int64_t pending() const {
      uint64_t bits;
      memcpy(&bits, field, sizeof bits);
      return __builtin_popcountll(bits);
    }
    PM_HD int64_t total() const { return sum + pending(); }
  };
  struct GroupCount {
    Count* to;
    PM_HD static GroupCount begin(Count* count) {
      count->sum += count->pending();
      return {count};
    }
    // Spelled out, because the compiler would collect the masks in a vector register: 9 instructions for 4.
    PM_HD void add(int g, Mask m) { asm("kmovw %1, %0" : "=m"(to->field[g]) : "k"(m)); }
    PM_HD void end() {}
  };
};
struct Avx512Bits {
  __m512i x;
};

PM_HD __m512i bits_of(Avx512 a) { return _mm512_castps_si512(a.x); }
PM_HD Avx512 from_bits(__m512i a) { return {_mm512_castsi512_ps(a)}; }

PM_HD Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.x, b.x)}; }
PM_HD Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.x, b.x)}; }
PM_HD Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.x, b.x)}; }
PM_HD Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.x, b.x)}; }
PM_HD Avx512Bits magnitude(Avx512 a) { return {_mm512_and_si512(bits_of(a), _mm512_set1_epi32(0x7fffffff))}; }
PM_HD __mmask16 at_least(Avx512Bits bits, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(bits.x, _mm512_set1_epi32(int(threshold)));
}
PM_HD Avx512 sign_bit(Avx512 a) {
  return from_bits(_mm512_and_si512(bits_of(a), _mm512_set1_epi32(int(0x80000000u))));
}
PM_HD Avx512 flip_sign(Avx512 a, Avx512 sign) {
  return from_bits(_mm512_xor_si512(bits_of(a), bits_of(sign)));
}
// As integers: faster than a float compare, and equal to it for every value but NaN, whose result is NaN
// anyway.
PM_HD __mmask16 is_positive(Avx512 a) { return _mm512_cmpgt_epi32_mask(bits_of(a), _mm512_setzero_si512()); }
PM_HD __mmask16 is_zero(Avx512 a) { return _mm512_cmp_ps_mask(a.x, _mm512_setzero_ps(), _CMP_EQ_OQ); }
PM_HD __mmask16 is_nan(Avx512 a) { return _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q); }
PM_HD __mmask16 larger(Avx512 a, Avx512 b) { return _mm512_cmpgt_epu32_mask(magnitude(a).x, magnitude(b).x); }
PM_HD Avx512 select(__mmask16 m, Avx512 yes, Avx512 no) { return {_mm512_mask_mov_ps(no.x, m, yes.x)}; }
PM_HD Avx512 keep_where(__mmask16 m, Avx512 a) { return {_mm512_maskz_mov_ps(m, a.x)}; }
PM_HD Avx512 add_where(__mmask16 m, Avx512 sum, Avx512 a) {
  return {_mm512_mask_add_ps(sum.x, m, sum.x, a.x)};
}
PM_HD Avx512 tally_where(__mmask16 m, Avx512 tally) { return add_where(m, tally, Avx512::set(1)); }
PM_HD Avx512 tallied(Avx512 tally) { return tally; }

// bf16 unordered: vectors 0 and 2 hold the even elements of 32, vectors 1 and 3 the odd ones, which saves
// the widening shuffle: the even ones are one shift, the odd ones one mask.
template <bool Ordered>
PM_HD void load_group(BF16, const uint16_t* p, Avx512 (&v)[kGroup]) {
  if constexpr (Ordered) {
    for (int g = 0; g < kGroup; ++g) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * g));
      v[g] = from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
  } else {
    for (int g = 0; g < kGroup; g += 2) {
      const __m512i raw = _mm512_loadu_si512(p + 16 * g);
      v[g] = from_bits(_mm512_slli_epi32(raw, 16));
      v[g + 1] = from_bits(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))));
    }
  }
}
template <bool Ordered>
PM_HD void load_group(F16, const uint16_t* p, Avx512 (&v)[kGroup]) {
  for (int g = 0; g < kGroup; ++g)
    v[g] = {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * g)))};
}
template <bool Ordered>
PM_HD void load_group(F32, const uint32_t* p, Avx512 (&v)[kGroup]) {
  for (int g = 0; g < kGroup; ++g) v[g] = {_mm512_loadu_ps(p + 16 * g)};
}

// Adds what rounds the upper half to nearest even; the caller takes the upper half.
template <class Doubles>
PM_HD void widen_group(const Avx512 (&v)[kGroup], Doubles (&to)[2 * kGroup]) {
  for (int g = 0; g < kGroup; ++g) {
    to[2 * g] = _mm512_cvtps_pd(_mm512_castps512_ps256(v[g].x));
    to[2 * g + 1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v[g].x, 1));
  }
}

PM_HD __m512i round_bf16(Avx512 a, __mmask16 nan) {
  const __m512i u = bits_of(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
template <bool Ordered>
PM_HD bool store_group(BF16, uint16_t* p, const Avx512 (&v)[kGroup], bool bypass_cache) {
  uint32_t nan = 0;
  for (int g = 0; g < kGroup; g += 2) {
    const __mmask16 n0 = is_nan(v[g]), n1 = is_nan(v[g + 1]);
    const __m512i r0 = round_bf16(v[g], n0), r1 = round_bf16(v[g + 1], n1);
    nan |= n0 | n1;
    __m512i line;
    if constexpr (Ordered)
      line = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(r0, 16))),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(r1, 16)), 1);
    else
      line = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(r0, 16), r1);
    store_line(p + 16 * g, line, bypass_cache);
  }
  return nan != 0;
}
template <bool Ordered>
PM_HD bool store_group(F16, uint16_t* p, const Avx512 (&v)[kGroup], bool bypass_cache) {
  uint32_t nan = 0;
  for (int g = 0; g < kGroup; g += 2) {
    __m256i half[2];
    for (int h = 0; h < 2; ++h) {
      const __mmask16 n = is_nan(v[g + h]);
      nan |= n;
      const __m256i r = _mm512_cvtps_ph(v[g + h].x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      half[h] = _mm256_mask_mov_epi16(r, n, _mm256_set1_epi16(0x7e00));
    }
    store_line(p + 16 * g, _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1), bypass_cache);
  }
  return nan != 0;
}
template <bool Ordered>
PM_HD bool store_group(F32, uint32_t* p, const Avx512 (&v)[kGroup], bool bypass_cache) {
  uint32_t nan = 0;
  for (int g = 0; g < kGroup; ++g) {
    const __mmask16 n = is_nan(v[g]);
    nan |= n;
    store_line(p + 16 * g, _mm512_mask_mov_epi32(bits_of(v[g]), n, _mm512_set1_epi32(0x7fc00000)),
               bypass_cache);
  }
  return nan != 0;
}

template <bool Ordered, class T>
PM_HD uint64_t element_mask(T, Avx512, uint64_t fields) {
  if constexpr (Ordered || T::dtype != DType::bf16) return fields;
  const uint64_t even = fields & 0x0000ffff0000ffffull, odd = (fields >> 16) & 0x0000ffff0000ffffull;
  // 32-bit halves keep their place; within each, 16 bits spread to every second bit.
  return _pdep_u64(even & 0xffff, 0x55555555ull) | _pdep_u64(odd & 0xffff, 0xaaaaaaaaull) |
         _pdep_u64(even >> 32, 0x55555555ull << 32) | _pdep_u64(odd >> 32, 0xaaaaaaaaull << 32);
}

// Sixteen words in the low halves of 64-bit lanes; the high halves hold anything. A wide product then needs
// no shuffling: its low word is in place, its high word one shift away.
struct Key512 {
  __m512i x;
};
struct Word512 {
  __m512i half[2];
  PM_HD Word512 operator^(Word512 b) const {
    return {{_mm512_xor_si512(half[0], b.half[0]), _mm512_xor_si512(half[1], b.half[1])}};
  }
  PM_HD Word512 operator^(Key512 b) const {
    return {{_mm512_xor_si512(half[0], b.x), _mm512_xor_si512(half[1], b.x)}};
  }
};
struct WideProduct512 {
  Word512 high, low;
};
PM_HD WideProduct512 multiply_wide(Word512 a, uint32_t m) {
  const __m512i factor = _mm512_set1_epi64(m);
  const __m512i p0 = _mm512_mul_epu32(a.half[0], factor), p1 = _mm512_mul_epu32(a.half[1], factor);
  return {{{_mm512_srli_epi64(p0, 32), _mm512_srli_epi64(p1, 32)}}, {{p0, p1}}};
}
PM_HD RoundKeys<Key512> random_keys(uint64_t key, Avx512) {
  RoundKeys<Key512> keys;
  for (uint32_t round = 0; round < kRounds; ++round) {
    keys.key0[round].x = _mm512_set1_epi64(uint32_t(key) + round * kKeyStep0);
    keys.key1[round].x = _mm512_set1_epi64(uint32_t(key >> 32) + round * kKeyStep1);
  }
  return keys;
}
PM_HD void random_words(uint64_t index, uint32_t expert, const RoundKeys<Key512>& keys, Avx512,
                        uint32_t* to) {
  const __m512i first =
      _mm512_add_epi64(_mm512_set1_epi64(int64_t(index >> 2)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const Word512 counter{{first, _mm512_add_epi64(first, _mm512_set1_epi64(8))}};
  Word512 c[4] = {counter,
                  {{_mm512_srli_epi64(counter.half[0], 32), _mm512_srli_epi64(counter.half[1], 32)}},
                  {{_mm512_set1_epi64(expert), _mm512_set1_epi64(expert)}},
                  {{_mm512_setzero_si512(), _mm512_setzero_si512()}}};
  philox(c, keys);
  const __m512i front = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                back = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  for (int h = 0; h < 2; ++h) {  // eight counters: their words 0 and 1 side by side, 2 and 3, then in order
    const __m512i low = _mm512_mask_blend_epi32(0xaaaa, c[0].half[h], _mm512_slli_epi64(c[1].half[h], 32));
    const __m512i high = _mm512_mask_blend_epi32(0xaaaa, c[2].half[h], _mm512_slli_epi64(c[3].half[h], 32));
    _mm512_storeu_si512(to + 32 * h, _mm512_permutex2var_epi64(low, front, high));
    _mm512_storeu_si512(to + 32 * h + 16, _mm512_permutex2var_epi64(low, back, high));
  }
}
PM_HD uint64_t words_below(const uint32_t* words, uint32_t limit, Avx512) {
  const __m512i bound = _mm512_set1_epi32(int(limit));
  uint64_t bits = 0;
  for (int g = 0; g < kGroup; ++g)
    bits |= uint64_t(_mm512_cmplt_epu32_mask(_mm512_loadu_si512(words + 16 * g), bound)) << (16 * g);
  return bits;
}
PM_HD void spread_bits(uint64_t bits, Avx512, __mmask16 (&mask)[kGroup]) {
  for (int g = 0; g < kGroup; ++g) mask[g] = __mmask16(bits >> (16 * g));
}

PM_HD void pack_group(Avx512, const uint32_t* from, uint64_t bits, uint32_t* to) {
  for (int g = 0; g < kGroup; ++g) {
    const __mmask16 m = __mmask16(bits >> (16 * g));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(from + 16 * g)));
    to += _mm_popcnt_u32(m);
  }
}

}  // namespace pm
