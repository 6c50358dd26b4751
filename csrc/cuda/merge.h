// Merging a group of tensors on the device: everything is queued on a stream, and the host never waits.
#pragma once
#include <vector>

#include "group.h"

namespace pm::cuda {

struct Request {
  Group group;
  Stream stream = {};
  bool base = true, elect = true, normalize = true, rescale = false, all_ties = false;
  bool own_cuts = false;  // each tensor has thresholds of its own; meant for small ones
  Trim trim = Trim::none;
  double lambda = 1;
  std::vector<double> weight, late, density, gamma;  // late: none, or one for each expert
  void* workspace = nullptr;
  int64_t samples = 0;   // per expert, a multiple of 32; they serve only the first round
  int64_t capacity = 0;  // undecided entries of one expert that find room
  double sigmas = 4, bias = 0;
};

// Bytes that `merge` needs; every pointer within is aligned to 256 bytes, as the workspace must be.
int64_t workspace_bytes(const Request& request);

// Queues the merge. T: BF16, F16 or F32. The table, the workspace and all tensors must stay until it has run.
template <class T>
void merge(const Request& request);

// Throws std::runtime_error if the device cannot run some kernel that `merge` would start. Starts nothing.
template <class T>
void check(const Request& request);

}  // namespace pm::cuda
