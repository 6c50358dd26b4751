// AVX2 lanes (f32 x 8) with F16C and BMI2: Haswell, Zen and later.
#pragma once
#include <immintrin.h>

#include "../core/lane.h"

namespace pm {

PM_HD void store_half_line(void* p, __m256i half, bool bypass_cache) {
  if (bypass_cache)
    _mm256_stream_si256(static_cast<__m256i*>(p), half);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(p), half);
}

struct Avx2 {
  using Work = float;
  using Bits = uint32_t;
  static constexpr int width = 8;
  __m256 x;

  struct Mask {
    __m256 x;  // all ones or all zeros per lane
    PM_HD Mask& operator|=(Mask b) {
      x = _mm256_or_ps(x, b.x);
      return *this;
    }
    PM_HD Mask operator^(Mask b) const { return {_mm256_xor_ps(x, b.x)}; }
  };
  PM_HD static Avx2 set(float value) { return {_mm256_set1_ps(value)}; }
  PM_HD static Mask none() { return {_mm256_setzero_ps()}; }
  PM_HD static Mask all() { return {_mm256_castsi256_ps(_mm256_set1_epi32(-1))}; }
  PM_HD static uint32_t mask_bits(Mask m) { return uint32_t(_mm256_movemask_ps(m.x)); }

  // One counter per lane: masks are -1, so subtracting counts, without leaving the vector registers.
  struct Count {
    __m256i sum;
    PM_HD static Count zero() { return {_mm256_setzero_si256()}; }
    PM_HD int64_t total() const {
      int32_t lane[width];
      memcpy(lane, &sum, sizeof lane);
      int64_t all = 0;
      for (int32_t n : lane) all += n;
      return all;
    }
  };
  struct GroupCount {
    Count* to;
    __m256i sum;
    PM_HD static GroupCount begin(Count* count) { return {count, count->sum}; }
    PM_HD void add(int /*g*/, Mask m) { sum = _mm256_sub_epi32(sum, _mm256_castps_si256(m.x)); }
    PM_HD void end() { to->sum = sum; }
  };
};
struct Avx2Bits {
  __m256i x;
};

PM_HD __m256i bits_of(Avx2 a) { return _mm256_castps_si256(a.x); }
PM_HD Avx2 from_bits(__m256i a) { return {_mm256_castsi256_ps(a)}; }
PM_HD Avx2::Mask as_mask(__m256i a) { return {_mm256_castsi256_ps(a)}; }

PM_HD Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.x, b.x)}; }
PM_HD Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.x, b.x)}; }
PM_HD Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.x, b.x)}; }
PM_HD Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.x, b.x)}; }
PM_HD Avx2Bits magnitude(Avx2 a) { return {_mm256_and_si256(bits_of(a), _mm256_set1_epi32(0x7fffffff))}; }
// There is no unsigned compare, but magnitudes are not negative and thresholds at most the sign bit.
PM_HD Avx2::Mask at_least(Avx2Bits bits, uint32_t threshold) {
  const __m256i last_below = _mm256_sub_epi32(_mm256_set1_epi32(int(threshold)), _mm256_set1_epi32(1));
  return as_mask(_mm256_cmpgt_epi32(bits.x, last_below));
}
PM_HD Avx2 sign_bit(Avx2 a) { return {_mm256_and_ps(a.x, _mm256_set1_ps(-0.0f))}; }
PM_HD Avx2 flip_sign(Avx2 a, Avx2 sign) { return {_mm256_xor_ps(a.x, sign.x)}; }
PM_HD Avx2::Mask is_positive(Avx2 a) {
  return as_mask(_mm256_cmpgt_epi32(bits_of(a), _mm256_setzero_si256()));
}
PM_HD Avx2::Mask is_zero(Avx2 a) { return {_mm256_cmp_ps(a.x, _mm256_setzero_ps(), _CMP_EQ_OQ)}; }
PM_HD Avx2::Mask is_nan(Avx2 a) { return {_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q)}; }
PM_HD Avx2::Mask larger(Avx2 a, Avx2 b) {
  return as_mask(_mm256_cmpgt_epi32(magnitude(a).x, magnitude(b).x));
}
PM_HD Avx2 select(Avx2::Mask m, Avx2 yes, Avx2 no) { return {_mm256_blendv_ps(no.x, yes.x, m.x)}; }
PM_HD Avx2 keep_where(Avx2::Mask m, Avx2 a) { return {_mm256_and_ps(m.x, a.x)}; }
// A sum that began at +0 is unchanged by adding +0, so masking the addend equals not adding.
PM_HD Avx2 add_where(Avx2::Mask m, Avx2 sum, Avx2 a) { return sum + keep_where(m, a); }
PM_HD Avx2 tally_where(Avx2::Mask m, Avx2 tally) {  // as integers: one subtraction of the mask
  return from_bits(_mm256_sub_epi32(bits_of(tally), _mm256_castps_si256(m.x)));
}
PM_HD Avx2 tallied(Avx2 tally) { return {_mm256_cvtepi32_ps(bits_of(tally))}; }

template <bool Ordered>
PM_HD void load_group(BF16, const uint16_t* p, Avx2 (&v)[kGroup]) {
  if constexpr (Ordered) {
    for (int g = 0; g < kGroup; ++g) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * g));
      v[g] = from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
  } else {  // even elements by a shift, odd ones by a mask
    for (int g = 0; g < kGroup; g += 2) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8 * g));
      v[g] = from_bits(_mm256_slli_epi32(raw, 16));
      v[g + 1] = from_bits(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000u))));
    }
  }
}
template <bool Ordered>
PM_HD void load_group(F16, const uint16_t* p, Avx2 (&v)[kGroup]) {
  for (int g = 0; g < kGroup; ++g)
    v[g] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * g)))};
}
template <bool Ordered>
PM_HD void load_group(F32, const uint32_t* p, Avx2 (&v)[kGroup]) {
  for (int g = 0; g < kGroup; ++g) v[g] = {_mm256_loadu_ps(reinterpret_cast<const float*>(p + 8 * g))};
}

// Spelled out: the compiler would convert a vector of four in two halves.
template <class Doubles>
PM_HD void widen_group(const Avx2 (&v)[kGroup], Doubles (&to)[2 * kGroup]) {
  for (int g = 0; g < kGroup; ++g) {
    to[2 * g] = _mm256_cvtps_pd(_mm256_castps256_ps128(v[g].x));
    to[2 * g + 1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v[g].x, 1));
  }
}

PM_HD __m256i round_bf16(Avx2 a, Avx2::Mask nan) {
  const __m256i u = bits_of(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan.x));
}
template <bool Ordered>
PM_HD bool store_group(BF16, uint16_t* p, const Avx2 (&v)[kGroup], bool bypass_cache) {
  Avx2::Mask nan{_mm256_setzero_ps()};
  for (int g = 0; g < kGroup; g += 2) {
    const Avx2::Mask n0 = is_nan(v[g]), n1 = is_nan(v[g + 1]);
    const __m256i r0 = _mm256_srli_epi32(round_bf16(v[g], n0), 16), r1 = round_bf16(v[g + 1], n1);
    nan |= n0;
    nan |= n1;
    __m256i half;
    if constexpr (Ordered)
      half = _mm256_permute4x64_epi64(_mm256_packus_epi32(r0, _mm256_srli_epi32(r1, 16)), 0xd8);
    else
      half = _mm256_blend_epi16(r0, r1, 0xaa);
    store_half_line(p + 8 * g, half, bypass_cache);
  }
  return Avx2::mask_bits(nan) != 0;
}
template <bool Ordered>
PM_HD bool store_group(F16, uint16_t* p, const Avx2 (&v)[kGroup], bool bypass_cache) {
  Avx2::Mask nan{_mm256_setzero_ps()};
  for (int g = 0; g < kGroup; g += 2) {
    __m128i quarter[2];
    for (int h = 0; h < 2; ++h) {
      const Avx2::Mask n = is_nan(v[g + h]);
      nan |= n;
      const Avx2 canonical = select(n, from_bits(_mm256_set1_epi32(0x7fc00000)), v[g + h]);
      quarter[h] = _mm256_cvtps_ph(canonical.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    store_half_line(p + 8 * g, _mm256_set_m128i(quarter[1], quarter[0]), bypass_cache);
  }
  return Avx2::mask_bits(nan) != 0;
}
template <bool Ordered>
PM_HD bool store_group(F32, uint32_t* p, const Avx2 (&v)[kGroup], bool bypass_cache) {
  Avx2::Mask nan{_mm256_setzero_ps()};
  for (int g = 0; g < kGroup; ++g) {
    const Avx2::Mask n = is_nan(v[g]);
    nan |= n;
    store_half_line(p + 8 * g, bits_of(select(n, from_bits(_mm256_set1_epi32(0x7fc00000)), v[g])),
                    bypass_cache);
  }
  return Avx2::mask_bits(nan) != 0;
}

template <bool Ordered, class T>
PM_HD uint64_t element_mask(T, Avx2, uint64_t fields) {
  const uint64_t bits = _pext_u64(fields, 0x00ff00ff00ff00ffull);
  if constexpr (Ordered || T::dtype != DType::bf16) return bits;
  return _pdep_u64(bits & 0xff, 0x5555) | _pdep_u64(bits >> 8 & 0xff, 0xaaaa) |
         _pdep_u64(bits >> 16 & 0xff, 0x55550000) | _pdep_u64(bits >> 24 & 0xff, 0xaaaa0000);
}

// Eight words in the low halves of 64-bit lanes; the high halves hold anything.
struct Key256 {
  __m256i x;
};
struct Word256 {
  __m256i half[2];
  PM_HD Word256 operator^(Word256 b) const {
    return {{_mm256_xor_si256(half[0], b.half[0]), _mm256_xor_si256(half[1], b.half[1])}};
  }
  PM_HD Word256 operator^(Key256 b) const {
    return {{_mm256_xor_si256(half[0], b.x), _mm256_xor_si256(half[1], b.x)}};
  }
};
struct WideProduct256 {
  Word256 high, low;
};
PM_HD WideProduct256 multiply_wide(Word256 a, uint32_t m) {
  const __m256i factor = _mm256_set1_epi64x(m);
  const __m256i p0 = _mm256_mul_epu32(a.half[0], factor), p1 = _mm256_mul_epu32(a.half[1], factor);
  return {{{_mm256_srli_epi64(p0, 32), _mm256_srli_epi64(p1, 32)}}, {{p0, p1}}};
}
PM_HD RoundKeys<Key256> random_keys(uint64_t key, Avx2) {
  RoundKeys<Key256> keys;
  for (uint32_t round = 0; round < kRounds; ++round) {
    keys.key0[round].x = _mm256_set1_epi64x(uint32_t(key) + round * kKeyStep0);
    keys.key1[round].x = _mm256_set1_epi64x(uint32_t(key >> 32) + round * kKeyStep1);
  }
  return keys;
}
PM_HD void random_words(uint64_t index, uint32_t expert, const RoundKeys<Key256>& keys, Avx2, uint32_t* to) {
  const __m256i first =
      _mm256_add_epi64(_mm256_set1_epi64x(int64_t(index >> 2)), _mm256_setr_epi64x(0, 1, 2, 3));
  const Word256 counter{{first, _mm256_add_epi64(first, _mm256_set1_epi64x(4))}};
  Word256 c[4] = {counter,
                  {{_mm256_srli_epi64(counter.half[0], 32), _mm256_srli_epi64(counter.half[1], 32)}},
                  {{_mm256_set1_epi64x(expert), _mm256_set1_epi64x(expert)}},
                  {{_mm256_setzero_si256(), _mm256_setzero_si256()}}};
  philox(c, keys);
  for (int h = 0; h < 2; ++h) {  // four counters: their words 0 and 1 side by side, 2 and 3, then in order
    const __m256i low = _mm256_blend_epi32(c[0].half[h], _mm256_slli_epi64(c[1].half[h], 32), 0xaa);
    const __m256i high = _mm256_blend_epi32(c[2].half[h], _mm256_slli_epi64(c[3].half[h], 32), 0xaa);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    auto* line = reinterpret_cast<__m256i*>(to + 16 * h);
    _mm256_storeu_si256(line, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(line + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
PM_HD uint64_t words_below(const uint32_t* words, uint32_t limit, Avx2) {
  const __m256i bound = _mm256_set1_epi32(int(limit));
  uint64_t not_below = 0;
  for (int g = 0; g < kGroup; ++g) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * g));
    const __m256i reaches = _mm256_cmpeq_epi32(_mm256_max_epu32(word, bound), word);
    not_below |= uint64_t(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(reaches)))) << (8 * g);
  }
  return not_below ^ 0xffffffff;
}
PM_HD void spread_bits(uint64_t bits, Avx2, Avx2::Mask (&mask)[kGroup]) {
  const __m256i all = _mm256_set1_epi32(int(bits)), first = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int g = 0; g < kGroup; ++g) {
    const __m256i lane_bit = _mm256_slli_epi32(first, 8 * g);
    mask[g] = as_mask(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane_bit), lane_bit));
  }
}

template <class Raw>
PM_HD void pack_group(Avx2, const Raw* from, uint64_t bits, Raw* to) {
  for (; bits; bits &= bits - 1) *to++ = from[_tzcnt_u64(bits)];
}

}  // namespace pm
