// Element types and the exact conversions between them, for host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define PM_HD __host__ __device__ __forceinline__
#else
// Always inlined: the same header is compiled for several instruction sets, and a shared out-of-line copy
// could carry instructions that the running processor lacks.
#define PM_HD inline __attribute__((always_inline))
#endif

namespace pm {

enum class DType : int { bf16 = 0, f16 = 1, f32 = 2, f64 = 3 };

PM_HD constexpr int itemsize(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

template <class To, class From>
PM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// What arithmetic runs in: f32 for the three narrow types, f64 for itself.
template <class Work>
struct WorkTraits;
template <>
struct WorkTraits<float> {
  using Bits = uint32_t;
  static constexpr Bits sign = 0x80000000u, infinity = 0x7f800000u, nan = 0x7fc00000u;
  static constexpr Bits nan_key = infinity + 1;  // as magnitudes all NaN are equal, above infinity
};
template <>
struct WorkTraits<double> {
  using Bits = uint64_t;
  static constexpr Bits sign = 1ull << 63, infinity = 0x7ffull << 52, nan = 0x7ff8ull << 48;
  static constexpr Bits nan_key = infinity + 1;
};

// Storage types: `Raw` is the integer the element travels as, `Work` the type it is computed in.
struct BF16 {
  using Raw = uint16_t;
  using Work = float;
  static constexpr DType dtype = DType::bf16;
  static constexpr Raw nan = 0x7fc0;
};
struct F16 {
  using Raw = uint16_t;
  using Work = float;
  static constexpr DType dtype = DType::f16;
  static constexpr Raw nan = 0x7e00;
};
struct F32 {
  using Raw = uint32_t;
  using Work = float;
  static constexpr DType dtype = DType::f32;
  static constexpr Raw nan = 0x7fc00000u;
};
struct F64 {
  using Raw = uint64_t;
  using Work = double;
  static constexpr DType dtype = DType::f64;
  static constexpr Raw nan = 0x7ff8ull << 48;
};

PM_HD float widen(BF16, uint16_t raw) { return bit_cast<float>(uint32_t(raw) << 16); }
PM_HD float widen(F32, uint32_t raw) { return bit_cast<float>(raw); }
PM_HD double widen(F64, uint64_t raw) { return bit_cast<double>(raw); }
PM_HD float widen(F16, uint16_t raw) {
#if defined(__CUDA_ARCH__)  // one instruction, the same value
  return __half2float(__ushort_as_half(raw));
#else
  const uint32_t sign = uint32_t(raw & 0x8000) << 16, body = raw & 0x7fff;
  if (body >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (body & 0x3ff) << 13);
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and is exact, subnormals included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(body << 13) * 0x1p112f));
#endif
}

// Round to nearest, ties to even; every NaN becomes the one canonical NaN of the type.
PM_HD uint32_t narrow(F32, float x) { return x != x ? F32::nan : bit_cast<uint32_t>(x); }
PM_HD uint64_t narrow(F64, double x) { return x != x ? F64::nan : bit_cast<uint64_t>(x); }
PM_HD uint16_t narrow(BF16, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  return x != x ? BF16::nan : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
PM_HD uint16_t narrow(F16, float x) {
#if defined(__CUDA_ARCH__)
  return x != x ? F16::nan : __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, body = u & 0x7fffffffu;
  if (body > 0x7f800000u) return F16::nan;
  if (body >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (body < 0x38800000u) {                                 // below 2^-14: adding 0.5 rounds at 2^-24
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(body) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((body - 0x38000000u + 0xfffu + ((body >> 13) & 1)) >> 13));
#endif
}

// f64 to f32 by rounding to odd: rounding the result again to a narrower type then equals rounding once
// (Boldo and Melquiond, "When double rounding is odd", 2005).
PM_HD float round_to_odd(double x) {
  const float near = float(x);
  if (x != x || double(near) == x) return near;
  const uint32_t u = bit_cast<uint32_t>(near);
  if (u & 1) return near;
  const bool rounded_up = (double(near) > x) == (x > 0);  // away from zero
  return bit_cast<float>(rounded_up ? u - 1 : u + 1);
}

}  // namespace pm
