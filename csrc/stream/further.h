// Results that differ from a group's own in lambda alone: finished from the same merged task vectors, piece
// by piece.
#pragma once
#include "tensor_params.h"

namespace pm {

template <class Work>
class FurtherResults {
 public:
  // Of the piece [first, first + count) of a tensor; `worker` keeps the buffers.
  FurtherResults(const Group<Work>& group, Worker& worker, size_t tensor, int64_t first, int64_t count)
      : group_(group), worker_(worker), tensor_(tensor), first_(first), count_(count) {
    if (worker.further.size() < group.further.size()) worker.further.resize(group.further.size());
    for (size_t f = 0; f < group.further.size(); ++f) {
      const JobView& view = group.further[f]->views[tensor];
      void* out = view.result(worker.further[f], first, count);
      start_.push_back(static_cast<char*>(out));
      further_.push_back({Work(group.further[f]->rule().lambda), out, false, 0});
    }
  }

  // A block that starts `at` elements into the piece writes them too.
  void attach(MapBlock<Work>* block, int64_t at) {
    const int64_t bytes = at * group_.views[tensor_].kernel_item();
    for (size_t f = 0; f < further_.size(); ++f) {
      const JobView& view = group_.further[f]->views[tensor_];
      further_[f].out = start_[f] + bytes;
      further_[f].bypass_cache = view.bypass_cache(further_[f].out, view.job().count);
    }
    block->further = further_.data(), block->furthers = int(further_.size());
  }

  void store() {
    for (size_t f = 0; f < further_.size(); ++f) {
      const Group<Work>& group = *group_.further[f];
      group.views[tensor_].store(worker_, first_, count_, start_[f]);
      group.count_nan(further_[f].nan);
    }
  }

 private:
  const Group<Work>& group_;
  Worker& worker_;
  size_t tensor_;
  int64_t first_, count_;
  std::vector<char*> start_;
  std::vector<Further<Work>> further_;
};

}  // namespace pm
