// The kernels for Avx512 lanes. Standard headers come first so that none of their functions is compiled for
// it.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(                                                                                  \
    __attribute__((target(                                                                                     \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,f16c,bmi,bmi2,popcnt,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx2,f16c,bmi,bmi2,popcnt,prefer-vector-width=512")
#endif
#include "instantiate.h"
#include "simd_avx512.h"

namespace pm {

const IsaKernels& avx512_kernels() {
  static const IsaKernels kernels = make_isa_kernels<Avx512>();
  return kernels;
}

}  // namespace pm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
