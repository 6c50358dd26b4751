// What the kernels need of CUDA. Compiled without it, they run on the processor through a stand-in of the
// same names (tests/shim/fiber.h).
#pragma once
#if defined(PM_CUDA)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#else
#include "fiber.h"
#endif

namespace pm::cuda {

#if defined(PM_CUDA)
using Stream = cudaStream_t;
#else
using Stream = fiber::Stream;
#endif

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... P, class... A>
void launch(Stream stream, dim3 blocks, int threads, void (*kernel)(P...), A... args) {
  kernel<<<blocks, threads, 0, stream>>>(args...);
  check(cudaGetLastError(), "a kernel could not be started");
}

// Fails where the device cannot run a kernel: no machine code for it, or not enough registers.
template <class... P>
void require(int threads, void (*kernel)(P...)) {
  cudaFuncAttributes found{};
  check(cudaFuncGetAttributes(&found, kernel), "a kernel is not there for this device");
  if (found.maxThreadsPerBlock < threads) throw std::runtime_error("a kernel needs a larger device");
}

inline void clear(Stream stream, void* to, size_t bytes) {
  check(cudaMemsetAsync(to, 0, bytes, stream), "device memory could not be cleared");
}

inline int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the device says nothing");
  return count;
}

// 16 bytes that are read or written once: they should not push anything out of the caches.
__device__ inline uint4 load_line(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }
__device__ inline void store_line(void* to, uint4 line) { __stcs(static_cast<uint4*>(to), line); }

#elif !defined(PM_CUDA)

template <class... P, class... A>
void launch(Stream stream, dim3 blocks, int threads, void (*kernel)(P...), A... args) {
  fiber::run(stream, blocks, threads, [&] { kernel(args...); });
}

template <class... P>
void require(int, void (*)(P...)) {
  fiber::require();
}

inline void clear(Stream, void* to, size_t bytes) { memset(to, 0, bytes); }
inline int processors() { return 2; }
inline uint4 load_line(const void* from) { return *static_cast<const uint4*>(from); }
inline void store_line(void* to, uint4 line) { *static_cast<uint4*>(to) = line; }

#endif

}  // namespace pm::cuda
