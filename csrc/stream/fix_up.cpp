// The last step of a one-pass merge: the few positions whose fate the thresholds decided.
#include "merge.h"

namespace pm {

namespace {

void replace_changed(RunContext& run, Worker& worker, const JobView& view, const Span& span,
                     uint32_t* position, char* before, char* fresh, int64_t fresh_nan) {
  const int64_t rows = span.end - span.begin;
  int64_t changed = 0, nan_before = 0;
  auto compact = [&]<class T>(T) {
    using Raw = typename T::Raw;
    const auto* was = reinterpret_cast<const Raw*>(before);
    auto* now = reinterpret_cast<Raw*>(fresh);
    for (int64_t i = 0; i < rows; ++i) {
      const uint32_t place = position[i];
      nan_before += was[i] == T::nan;
      now[changed] = now[i];
      position[changed] = place;
      changed += now[i] != was[i];
    }
  };
  switch (view.kernel_dtype()) {
    case DType::bf16: compact(BF16{}); break;
    case DType::f16: compact(F16{}); break;
    case DType::f32: compact(F32{}); break;
    case DType::f64: compact(F64{}); break;
  }
  run.report.nan += fresh_nan - nan_before;
  if (!changed) return;
  const uint32_t first = position[0], last = position[changed - 1];
  for (int64_t i = 0; i < changed; ++i) position[i] -= first;
  view.patch(worker, span.origin + first, int64_t(last - first) + 1, position, fresh, changed);
}

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
    thresholds_at(cuts, flat + position[row], &keep);
    for (int k = 0; k < group.experts(); ++k)
      worker.block_expert[size_t(k)] = layout.expert(slab, k) + row * int64_t(item);
    MapBlock<Work> block;
    block.base = layout.base(slab) + row * int64_t(item);
    block.expert = worker.block_expert.data();
    block.out = fresh + (row - span.begin) * int64_t(item);
    block.count = stop - row;
    block.keep_at = keep.data();
    nan += kernel(params.block, block, nullptr, scratch);
    row = stop;
  }
  char* before = layout.provisional(slab) + span.begin * int64_t(item);
  replace_changed(group.run(), worker, view, span, position + span.begin, before, fresh, nan);
}

}  // namespace

// Maps the undecided again, now with the exact cuts, and replaces the results that changed.
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
