// A group: the tensors over which one threshold per expert is taken. One tensor, or the whole model.
#pragma once
#include <memory>
#include <span>

#include "../cpu/parallel.h"
#include "../cpu/select.h"
#include "undecided.h"

namespace pm {

template <class Work>
class Group {
 public:
  using Bits = typename WorkTraits<Work>::Bits;

  // `jobs` in flat-index order. Tensors of several types share the kernels of the widest.
  Group(RunContext& run, int64_t number, const std::vector<int64_t>& jobs);
  // The same tensors with one expert of `whole` alone, and a cut for each of `ranks`; results go nowhere.
  Group(const Group& whole, int expert, std::vector<int64_t> ranks);
  Group(const Group&) = delete;
  Group(Group&&) = default;

  RunContext& run() const { return run_; }
  const Rule& rule() const { return rule_; }
  const KernelSet<Work>& kernels(const JobView& view) const {
    return kernel_set<Work>(run_.settings.isa, view.kernel_dtype());
  }
  int experts() const { return views[0].expert_count(); }
  // Cuts are numbered: the threshold of each expert, then the outliers' of each expert where they are
  // dropped.
  int cuts() const { return int(ranks_.size()); }
  int expert_of(int cut) const { return cut % experts(); }
  // How many entries of its expert reach a cut: -1 all, else exactly this many.
  int64_t rank(int cut) const { return ranks_[size_t(cut)]; }
  // Whether the trim leaves out anything.
  bool trims() const;
  // Whether sorting out all keys is cheaper than sampling.
  bool is_small() const { return size <= kSmall; }
  // One tensor whose inputs the cache holds.
  bool is_whole() const;
  // Whether any cut lies among the entries.
  bool searched() const;
  // Adds to how many results are NaN.
  void count_nan(int64_t nan) const { run_.nan[size_t(views[0].job().variant)] += nan; }
  uint64_t flat(size_t tensor, int64_t element) const { return origins[tensor] + uint64_t(element); }

  // Pieces of at most `size` elements over all tensors, numbered in flat order.
  struct Piece {
    size_t tensor;
    int64_t first, count;
  };
  int64_t piece_count(int64_t size) const;
  Piece piece(int64_t number, int64_t size) const;

  const int64_t number;
  std::vector<JobView> views;
  std::vector<uint64_t> origins;  // flat index of each tensor's first element
  uint64_t size = 0;
  std::vector<const Group*> further;  // of the same inputs; what is mapped here is finished for them, too

 private:
  static constexpr uint64_t kSmall = 16384;  // elements

  // A tensor with one of its experts.
  struct Part {
    TensorJob job;
    Region input[2];
  };

  RunContext& run_;
  const Rule& rule_;
  std::vector<int64_t> ranks_;
  std::vector<std::unique_ptr<Part>> parts_;
  mutable std::vector<int64_t> piece_starts_;
  mutable int64_t piece_size_ = 0;
};

// Calls body(first, count) for the longest runs of [first, first + count) in which no cut changes its
// threshold.
template <class F>
void each_segment(std::initializer_list<std::span<const Cut>> cuts, uint64_t flat, int64_t count, F&& body) {
  int64_t at = 0;
  while (at < count) {
    uint64_t end = flat + uint64_t(count);
    for (const auto& list : cuts)
      for (const Cut& cut : list)
        if (cut.index > flat + uint64_t(at) && cut.index < end) end = cut.index;
    const int64_t next = int64_t(end - flat);
    body(at, next - at);
    at = next;
  }
}

}  // namespace pm
