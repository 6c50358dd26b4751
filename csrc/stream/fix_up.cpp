// The last step of a one-pass merge: the few positions whose fate the thresholds decide.
#include "merge.h"

namespace pm {

namespace {

template <class Work>
void fix_up_span(const Group<Work>& group, Worker& worker, const ChunkLayout& layout, char* slab,
                 const Span& span, const std::vector<Cut>& cuts, const TensorParams<Work>& params) {
  using Bits = typename WorkTraits<Work>::Bits;
  const JobView& view = group.views[size_t(span.tensor)];
  const uint64_t flat = group.flat(size_t(span.tensor), span.origin);
  uint32_t* position = layout.position(slab);
  std::vector<int64_t> stops;  // rows at which some expert's threshold changes
  for (const Cut& cut : cuts)
    if (cut.index > flat && cut.index < flat + uint64_t(span.size))
      stops.push_back(
          std::lower_bound(position + span.begin, position + span.end, uint32_t(cut.index - flat)) -
          position);
  stops.push_back(span.end);
  std::sort(stops.begin(), stops.end());
  const size_t item = size_t(view.kernel_item());
  char* fresh = static_cast<char*>(worker.result.reserve(size_t(span.end - span.begin) * item + 64));
  void* scratch = worker.scratch.reserve(map_scratch_bytes(group.experts()));
  const MapFn<Work> kernel = kernel_for(group, view, params, Collect::no);
  std::vector<Bits> keep;
  worker.block_expert.resize(size_t(group.experts()));
  int64_t nan = 0;
  for (int64_t row = span.begin; int64_t stop : stops) {
    if (stop == row) continue;
    thresholds_at<Work>(cuts, flat + position[row], &keep);
    for (int k = 0; k < group.experts(); ++k)
      worker.block_expert[size_t(k)] = layout.expert(slab, k) + row * int64_t(item);
    MapBlock<Work> block;
    block.base = layout.base(slab) + row * int64_t(item);
    block.expert = worker.block_expert.data();
    block.out = fresh + (row - span.begin) * int64_t(item);
    block.count = stop - row;
    block.keep_at = keep.data();
    nan += kernel(params.block, block, scratch);
    row = stop;
  }
  group.count_nan(nan);
  const uint32_t first = position[span.begin], last = position[span.end - 1];
  for (int64_t row = span.begin; row < span.end; ++row) position[row] -= first;
  view.patch(worker, span.origin + first, int64_t(last - first) + 1, position + span.begin, fresh,
             span.end - span.begin);
}

}  // namespace

// Maps the undecided again, now with the exact cuts, and replaces their results.
template <class Work>
void fix_up(const Group<Work>& group, Crew& crew, UndecidedStore& store, const std::vector<Cut>& cuts,
            const std::vector<TensorParams<Work>>& params) {
  crew.each(int64_t(store.chunks().size()), [&](int member, int64_t number) {
    Worker& worker = group.run().workers[size_t(member)];
    const Chunk& chunk = *store.chunks()[size_t(number)];
    if (chunk.size == 0) return;
    char* slab = store.open(chunk, worker);
    for (const Span& span : chunk.spans)
      if (span.end > span.begin)
        fix_up_span(group, worker, store.layout(), slab, span, cuts, params[size_t(span.tensor)]);
  });
}

template void fix_up(const Group<float>&, Crew&, UndecidedStore&, const std::vector<Cut>&,
                     const std::vector<TensorParams<float>>&);
template void fix_up(const Group<double>&, Crew&, UndecidedStore&, const std::vector<Cut>&,
                     const std::vector<TensorParams<double>>&);

}  // namespace pm
