// The kernels for Avx2 lanes. Standard headers come first so that none of their functions is compiled for it.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt")
#endif
#include "instantiate.h"
#include "simd_avx2.h"

namespace pm {

const IsaKernels& avx2_kernels() {
  static const IsaKernels kernels = make_isa_kernels<Avx2>();
  return kernels;
}

}  // namespace pm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
