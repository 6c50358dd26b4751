#include "workspace.h"

#include "select.cuh"

namespace pm::cuda {

namespace {

class Carver {
 public:
  explicit Carver(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    char* here = start_ + used_;
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(here);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

}  // namespace

State carve(const Request& r, int64_t* bytes, int64_t* control) {
  const int64_t experts = r.group.experts;
  const bool searched = by_magnitude(r.trim) && !r.own_cuts, outliers = r.trim == Trim::outliers;
  const bool streamed = searched && !outliers;
  Carver carver(r.workspace);
  State s{};
  s.expert = carver.take<Expert>(experts);
  s.bins = carver.take<unsigned long long>(searched ? experts * 2 * kBins : 0);
  s.ticket = carver.take<unsigned int>(experts * 2);
  s.tally = carver.take<unsigned long long>(streamed ? kStrata * (1 + experts) : 0);
  s.seen = carver.take<unsigned long long>(1);
  s.missed = carver.take<int>(1);
  *control = carver.used();  // up to here everything starts as zero
  s.samples = r.samples;
  s.capacity = r.capacity;
  s.sample = carver.take<uint32_t>(streamed ? experts * s.samples : 0);
  s.list_magnitude = carver.take<uint32_t>(streamed ? experts * s.capacity : 0);
  s.list_index = carver.take<uint64_t>(streamed ? experts * s.capacity : 0);
  s.masses = carver.take<double>(r.rescale ? r.group.blocks * experts * 2 : 0);
  s.scale = carver.take<float>(r.rescale ? r.group.tensors * experts : 0);
  s.cuts = carver.take<Cut>(r.own_cuts ? r.group.tensors * experts : 0);
  s.drops = carver.take<Cut>(r.own_cuts && outliers ? r.group.tensors * experts : 0);
  *bytes = carver.used();
  return s;
}

int64_t workspace_bytes(const Request& request) {
  int64_t bytes, control;
  carve(request, &bytes, &control);
  return bytes;
}

Rule rule_of(const Request& r) {
  Rule rule{};
  float total = 0;
  for (int k = 0; k < r.group.experts; ++k) {
    const double density = r.density[size_t(k)];
    rule.weight[k] = float(r.weight[size_t(k)]);
    rule.late[k] = r.late.empty() ? 1 : float(r.late[size_t(k)]);
    rule.density[k] = density;
    rule.whole[k] = density >= 1;
    rule.limit[k] = random_limit(density);
    if (r.trim == Trim::outliers) rule.gamma[k] = r.gamma[size_t(k)];
    total += rule.weight[k];
  }
  rule.lambda = float(r.lambda);
  rule.divisor = combine_divisor(r.base, total);
  rule.normalize = r.normalize;
  rule.all_ties = r.all_ties;
  rule.outliers = r.trim == Trim::outliers;
  return rule;
}

}  // namespace pm::cuda
