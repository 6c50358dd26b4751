// What the tile pipeline is asked to do. Inputs are numbered base first (if there is one), then experts.
#pragma once
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/params.h"
#include "../cpu/kernels.h"

namespace pm {

constexpr int kInMemory = -1, kCompound = -2;

// Contiguous elements: `start` is a byte offset in an open file, an address when `file` is kInMemory, the
// number of a compound when it is kCompound.
struct Region {
  int64_t start = 0;
  int32_t file = kInMemory;
  int32_t item = 0;  // bytes of one element
  DType dtype = DType::f32;

  void* address(int64_t element) const { return reinterpret_cast<void*>(start + element * item); }
};

struct Rule {
  bool base = true, elect = true, normalize = true, rescale = false, all_ties = false, one_more = false;
  Trim trim = Trim::none;
  double lambda = 1;
  std::vector<double> weight, late, density, gamma, epsilon;  // one for each expert, or none
  Blending blend;
  Fuse fuse = Fuse::none;
  double t = 0, boost = 0, most_boost = 0;  // the numbers of a fuse's formula
  int votes = 0;

  bool operator==(const Rule&) const = default;
};

struct TensorJob {
  int64_t count = 0;
  int64_t row = 0;      // elements of a row, for blends of rows or columns; 0: all
  int32_t rule = -1;    // -1: inputs must be equal and are copied
  int32_t variant = 0;  // of several rules for the same inputs
  bool has_cast = false;
  DType cast = DType::f32;
  uint64_t key = 0;  // of the random stream
  int32_t inputs = 0;
  const Region* input = nullptr;
  Region out;
};

struct Settings {
  Isa isa = Isa::best;
  int threads = 1;
  int64_t tile = 32768;
  int64_t memory = 64 << 20;  // for undecided positions
  int64_t cached = 2 << 20;   // bytes of a tensor's inputs up to which it is merged in the cache
  double sigmas = 4;          // half width of the bracket in standard errors
  double bracket_bias = 0;    // shifts the bracket by this share of the ranks: tests force a miss with it
  bool drop_behind = false;   // tell the kernel that inputs read are not needed again
  int spill = -1;             // file for undecided positions past `memory`
};

struct Report {
  std::atomic<int64_t> bytes_read{0}, bytes_written{0}, elements{0}, undecided{0};
  std::atomic<int64_t> searched{0}, misses{0}, overflows{0};
  std::atomic<bool> cancelled{false};
};

// A fault with its place: which job, which of its inputs (kOutput: the result), which file (kInMemory: any).
struct StreamError : std::runtime_error {
  static constexpr int kOutput = -1;
  StreamError(int64_t job, int input, const std::string& what, int file = kInMemory)
      : std::runtime_error(what), job(job), input(input), file(file) {}
  int64_t job;
  int input, file;
};
struct Cancelled {};

}  // namespace pm
