// The tables of compiled kernels: one per instruction set and element type, chosen at run time.
#pragma once
#include "draw.h"
#include "fuse.h"
#include "rank.h"
#include "score.h"

namespace pm {

enum class Isa : int { best = -1, scalar = 0, avx2 = 1, avx512 = 2 };

template <class Work>
using MapFn = int64_t (*)(const MapParams<Work>&, const MapBlock<Work>&, void* scratch);

// What selects a map kernel at run time.
struct MapShape {
  bool base, elect, unit;
  Trim trim;
  Collect collect;
};

template <class Work>
struct KernelSet {
  using Bits = typename WorkTraits<Work>::Bits;
  MapFn<Work> linear, sum, sum_given, elect, elect_unit, elect_given;
  // By Collect.
  MapFn<Work> sum_magnitude[3], elect_magnitude[3], elect_magnitude_unit[3], sum_outliers[3],
      elect_outliers[3];
  void (*keys)(const void* base, const void* expert, int64_t count, Bits* key);
  Bits (*row_keys)(const void* base, const void* expert, int64_t count, Bits* key);
  void (*bins)(const Bits* key, int64_t count, int shift, Bits offset, uint16_t* bin, uint8_t* loose);
  int64_t (*open_keys)(const void* base, const void* expert, int64_t count, Bits low, Bits high,
                       OpenKeys<Bits>* to);
  int64_t (*count_open)(const void* base, const void* expert, int64_t count, Bits low, Bits high);
  MapFn<Work> search;
  void (*masses)(const MapParams<Work>&, const MapBlock<Work>&, int k, int64_t offset, Masses*);
  void (*energies)(const MapBlock<Work>&, int k, int64_t offset, double* lanes);
  MapFn<Work> fuse[kFuses], fuse_given[kFuses];  // by Fuse
  void (*overlaps)(const MapParams<Work>&, const MapBlock<Work>&, int64_t* alone, int64_t* shared,
                   void* scratch);
  void (*variance)(const MapBlock<Work>&, int experts, Bits* score, void* scratch);
  void (*importance)(const MapBlock<Work>&, Work row, Bits* score);
  void (*reach)(const Bits* keys, int64_t count, Bits least, uint64_t* bits);
  double (*most)(const void* input, int64_t count);
  void (*exponentials)(const void* input, int64_t count, double most, double* lanes, double* to);
  void (*divergence)(const double* base, const double* input, int64_t count, const RowSums&, double* lanes);
  void (*gram)(const void* base, const void* const* input, int inputs, int64_t count, double* lanes,
               double* scratch);

  MapFn<Work> map(const MapShape& s) const {
    if (!s.base) return linear;
    if (s.trim == Trim::outliers) return (s.elect ? elect_outliers : sum_outliers)[int(s.collect)];
    if (s.trim == Trim::magnitude && !s.elect) return sum_magnitude[int(s.collect)];
    if (s.trim == Trim::magnitude) return (s.unit ? elect_magnitude_unit : elect_magnitude)[int(s.collect)];
    if (s.trim == Trim::given) return s.elect ? elect_given : sum_given;
    return !s.elect ? sum : s.unit ? elect_unit : this->elect;
  }
};

// Conversions between a storage type and the working type, `count` elements.
using ConvertFn = void (*)(const void* from, void* to, int64_t count);

struct IsaKernels {
  KernelSet<float> f32[3];  // by DType: bf16, f16, f32
  DrawKernels draw;
  ConvertFn widen[3], narrow[3];
};

const IsaKernels& scalar_kernels();
const KernelSet<double>& double_kernels();
#if defined(__x86_64__)
const IsaKernels& avx2_kernels();
const IsaKernels& avx512_kernels();
#endif

bool isa_available(Isa isa);
Isa best_isa();
const char* isa_name(Isa isa);
const IsaKernels& isa_kernels(Isa isa);

template <class Work>
const KernelSet<Work>& kernel_set(Isa isa, DType dtype);

// Makes results that bypassed the cache visible to other threads.
void publish_stores();

// Element conversion between any two storage types, through the wider working type.
void convert(Isa isa, DType from, DType to, const void* source, void* target, int64_t count);

}  // namespace pm
