// Which instruction set runs: the best one the processor has, or the one that is asked for.
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace pm {

void publish_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

bool isa_available(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && isa_available(Isa::avx2);
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");
#endif
  return isa == Isa::scalar || isa == Isa::best;
}

Isa best_isa() {
  return isa_available(Isa::avx512) ? Isa::avx512 : isa_available(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::best: break;
  }
  return "best";
}

const IsaKernels& isa_kernels(Isa isa) {
  if (isa == Isa::best) isa = best_isa();
  if (!isa_available(isa)) throw std::invalid_argument(std::string("this processor has no ") + isa_name(isa));
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512_kernels();
  if (isa == Isa::avx2) return avx2_kernels();
#endif
  return scalar_kernels();
}

template <>
const KernelSet<float>& kernel_set<float>(Isa isa, DType dtype) {
  return isa_kernels(isa).f32[int(dtype)];
}
template <>
const KernelSet<double>& kernel_set<double>(Isa, DType) {
  return double_kernels();
}

namespace {

void to_double(DType from, const void* source, double* target, int64_t count, const IsaKernels& kernels) {
  if (from == DType::f64) {
    memcpy(target, source, size_t(count) * 8);
    return;
  }
  std::vector<float> wide(static_cast<size_t>(count));
  kernels.widen[int(from)](source, wide.data(), count);
  std::copy(wide.begin(), wide.end(), target);
}

// Straight from f64 to a narrow type: rounding through f32 first could round twice.
void from_double(DType to, const double* source, void* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    switch (to) {
      case DType::f64: static_cast<uint64_t*>(target)[i] = narrow(F64{}, source[i]); break;
      case DType::f32: static_cast<uint32_t*>(target)[i] = narrow(F32{}, float(source[i])); break;
      case DType::f16: static_cast<uint16_t*>(target)[i] = narrow(F16{}, round_to_odd(source[i])); break;
      case DType::bf16: static_cast<uint16_t*>(target)[i] = narrow(BF16{}, round_to_odd(source[i])); break;
    }
  }
}

}  // namespace

void convert(Isa isa, DType from, DType to, const void* source, void* target, int64_t count) {
  const IsaKernels& kernels = isa_kernels(isa);
  if (from == DType::f64 || to == DType::f64) {
    std::vector<double> wide(static_cast<size_t>(count));
    to_double(from, source, wide.data(), count, kernels);
    from_double(to, wide.data(), target, count);
  } else if (to == DType::f32) {
    kernels.widen[int(from)](source, target, count);
  } else if (from == DType::f32) {
    kernels.narrow[int(to)](source, target, count);
  } else {
    std::vector<float> wide(static_cast<size_t>(count));
    kernels.widen[int(from)](source, wide.data(), count);
    kernels.narrow[int(to)](wide.data(), target, count);
  }
}

}  // namespace pm
