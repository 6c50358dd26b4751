#include "merge.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace pm {

namespace {

constexpr uint64_t kSmallGroup = 16384;  // elements up to which sorting out all keys is cheaper than sampling

// The parameter block of one tensor with the arrays it points to.
template <class Work>
struct TensorParams {
  std::vector<Work> weight, scale;
  std::vector<uint32_t> limit;
  std::vector<uint8_t> whole;
  MapParams<Work> block;

  TensorParams(const Rule& rule, uint64_t key) : scale(rule.weight.size(), Work(1)) {
    Work total = 0;
    for (double w : rule.weight) {
      weight.push_back(Work(w));
      total += Work(w);
    }
    for (double density : rule.density) {
      whole.push_back(density >= 1);
      limit.push_back(density >= 1 ? ~0u : uint32_t(std::max(density, 0.0) * 0x1p32));
    }
    block.experts = int(weight.size());
    block.lambda = Work(rule.lambda);
    block.normalize = rule.normalize;
    block.divisor = rule.base && std::fabs(total) < Work(1e-8) ? Work(1) : total;
    block.key0 = uint32_t(key);
    block.key1 = uint32_t(key >> 32);
    block.weight = weight.data(), block.scale = scale.data();
    block.limit = limit.data(), block.whole = whole.data();
  }
  TensorParams(TensorParams&&) = default;  // moved vectors keep their memory, so the block stays true

  bool unit() const {
    auto is_one = [](Work w) { return w == 1; };
    return std::all_of(weight.begin(), weight.end(), is_one) && std::all_of(scale.begin(), scale.end(), is_one);
  }
};

template <class Bits>
void thresholds_at(const std::vector<Cut>& cuts, uint64_t flat, std::vector<Bits>* to) {
  to->resize(cuts.size());
  for (size_t k = 0; k < cuts.size(); ++k) (*to)[k] = threshold_at<Bits>(cuts[k], flat);
}

template <class Work>
class GroupMerge {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  GroupMerge(Group<Work>& group, Crew& crew) : group_(group), run_(group.run()), rule_(group.rule()), crew_(crew) {
    params_.reserve(group.views.size());
    for (const auto& view : group.views) params_.emplace_back(rule_, view.job().key);
  }

  void merge() {
    const bool searched = rule_.trim == Trim::magnitude && !each_expert([](int64_t kept) { return kept < 0; });
    if (!searched) {
      if (rule_.trim == Trim::random && rule_.rescale) rescale({});
      return map({});
    }
    if (!run_.cuts[size_t(group_.number)].empty()) return finish(run_.cuts[size_t(group_.number)]);
    run_.report.searched += 1;
    const bool trivial = each_expert([](int64_t kept) { return kept <= 0; });
    if (group_.size <= kSmallGroup || trivial) return finish(small_cuts());
    const Bracket bracket = sample_bracket(group_, crew_);
    try {
      UndecidedStore store(run_, group_.experts(), group_.views[0].kernel_item());
      const Counts counts = stream(bracket, store);
      std::vector<Cut> cuts;
      if (select_cuts(group_, crew_, store, bracket, counts, &cuts)) {
        run_.report.undecided += store.rows();
        run_.cuts[size_t(group_.number)] = cuts;
        if (!rule_.rescale) return fix_up(store, cuts);
        forget_output();
        return finish(cuts);
      }
      run_.report.misses += 1;
    } catch (const Overflow&) {
      run_.report.overflows += 1;
    }
    forget_output();
    finish(exact_cuts(group_, crew_));
  }

 private:
  template <class F>
  bool each_expert(F&& test) const {
    for (int k = 0; k < group_.experts(); ++k)
      if (!test(group_.kept(k))) return false;
    return true;
  }

  // A second reading starts over: what the abandoned pass counted does not count.
  void forget_output() {
    run_.report.nan -= stream_nan_;
    stream_nan_ = 0;
  }

  void finish(const std::vector<Cut>& cuts) {
    run_.cuts[size_t(group_.number)] = cuts;
    if (rule_.rescale) rescale(cuts);
    map(cuts);
  }

  std::vector<Cut> small_cuts() {
    const int experts = group_.experts();
    std::vector<Cut> cuts(static_cast<size_t>(experts), Cut::keep_all());
    for (int k = 0; k < experts; ++k)
      if (group_.kept(k) == 0) cuts[size_t(k)] = Cut::keep_none();
    if (each_expert([](int64_t kept) { return kept <= 0; })) return cuts;
    std::vector<std::vector<Bits>> keys(static_cast<size_t>(experts), std::vector<Bits>(group_.size));
    Worker& worker = run_.workers[size_t(crew_.size() - 1)];
    for (size_t t = 0; t < group_.views.size(); ++t) {
      const JobView& view = group_.views[t];
      view.load(worker, 0, view.job().count);
      for (int k = 0; k < experts; ++k)
        group_.kernels(view).keys(worker.tile.base, worker.tile.expert[size_t(k)], view.job().count,
                                  keys[size_t(k)].data() + group_.origins[t]);
    }
    for (int k = 0; k < experts; ++k) {
      if (group_.kept(k) <= 0) continue;
      const KeyRanks<Bits> ranks(keys[size_t(k)].data(), int64_t(group_.size));
      int64_t larger;
      const Bits key = ranks.nth_largest(group_.kept(k), &larger);
      const uint64_t last = uint64_t(ranks.nth_equal(key, group_.kept(k) - larger));
      cuts[size_t(k)] = {key, rule_.all_ties ? Cut::kAllIndices : last + 1};
    }
    return cuts;
  }

  // Reads every input once; writes the output as if the undecided were trimmed.
  Counts stream(const Bracket& bracket, UndecidedStore& store) {
    const int experts = group_.experts();
    std::vector<Counts> counts(size_t(crew_.size()), Counts(experts));
    std::vector<Chunk*> chunks(size_t(crew_.size()), nullptr);
    std::atomic<int64_t> nan{0};
    const int64_t tile = run_.settings.tile;
    crew_.each(group_.piece_count(tile), [&](int member, int64_t number) {
      Worker& worker = run_.workers[size_t(member)];
      const auto piece = group_.piece(number, tile);
      const JobView& view = group_.views[piece.tensor];
      view.read_ahead(piece.first, tile);
      view.load(worker, piece.first, piece.count);
      void* out = view.result(worker, piece.first, piece.count);
      nan += stream_piece(worker, piece, out, bracket, store, &chunks[size_t(member)], &counts[size_t(member)]);
      view.store(worker, piece.first, piece.count, out);
    });
    for (Chunk* chunk : chunks)
      if (chunk) store.seal(chunk);
    stream_nan_ = nan;
    run_.report.nan += stream_nan_;
    Counts sum(experts);
    for (const Counts& c : counts)
      for (size_t k = 0; k < size_t(experts); ++k)
        sum.above[k] += c.above[k], sum.kept[k] += c.kept[k], sum.opened[k] += c.opened[k];
    return sum;
  }

  int64_t stream_piece(Worker& worker, const typename Group<Work>::Piece& piece, void* out, const Bracket& bracket,
                       UndecidedStore& store, Chunk** chunk, Counts* counts) {
    const JobView& view = group_.views[piece.tensor];
    const uint64_t flat = group_.flat(piece.tensor, piece.first);
    const Collect collect = rule_.all_ties ? Collect::all : Collect::first;
    const MapFn<Work> kernel = kernel_for(view, params_[piece.tensor], collect);
    const MapParams<Work>& params = params_[piece.tensor].block;
    void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
    std::vector<Bits> keep, open, count;
    int64_t nan = 0;
    bool new_span = true;
    each_segment({&bracket.low, &bracket.high}, flat, piece.count, [&](int64_t begin, int64_t size) {
      thresholds_at(bracket.high, flat + uint64_t(begin), &keep);
      thresholds_at(bracket.low, flat + uint64_t(begin), &open);
      if (collect == Collect::all) {
        count = keep;
        for (Bits& c : count) c += c != Bits(~Bits(0));
      }
      for (int64_t at = begin; at < begin + size; at += UndecidedStore::kBlock) {
        const int64_t n = std::min(UndecidedStore::kBlock, begin + size - at);
        if (!*chunk || (*chunk)->size + UndecidedStore::kBlock + kMaxGroup > store.layout().rows) {
          *chunk = store.next(*chunk);
          new_span = true;
        }
        if (new_span) (*chunk)->spans.push_back({int32_t(piece.tensor), piece.first, piece.count, (*chunk)->size, (*chunk)->size});
        new_span = false;
        MapBlock<Work> block = block_at(worker, view, out, at, n);
        block.keep_at = keep.data(), block.open_at = open.data(), block.count_at = count.data();
        block.above = counts->above.data(), block.kept = counts->kept.data(), block.opened = counts->opened.data();
        nan += append_undecided(kernel, params, block, store.layout(), *chunk, at, worker, scratch);
      }
    });
    return nan;
  }

  int64_t append_undecided(MapFn<Work> kernel, const MapParams<Work>& params, const MapBlock<Work>& block,
                           const ChunkLayout& layout, Chunk* chunk, int64_t at, Worker& worker, void* scratch) {
    UndecidedColumns columns;
    worker.column_expert.resize(size_t(params.experts));
    for (int k = 0; k < params.experts; ++k) worker.column_expert[size_t(k)] = layout.expert(chunk->slab, k);
    columns.base = layout.base(chunk->slab), columns.expert = worker.column_expert.data();
    columns.provisional = layout.provisional(chunk->slab), columns.position = layout.position(chunk->slab);
    columns.size = chunk->size, columns.origin = uint32_t(at);
    const int64_t nan = kernel(params, block, &columns, scratch);
    chunk->size = chunk->spans.back().end = columns.size;
    return nan;
  }

  MapFn<Work> kernel_for(const JobView& view, const TensorParams<Work>& p, Collect collect) const {
    Trim trim = rule_.trim;
    if (trim == Trim::magnitude && each_expert([](int64_t kept) { return kept < 0; })) trim = Trim::none;
    return group_.kernels(view).map({rule_.base, rule_.elect, p.unit(), trim, collect});
  }

  // The part of the loaded tile that starts `at` elements in.
  MapBlock<Work> block_at(Worker& worker, const JobView& view, void* out, int64_t at, int64_t count) {
    const int64_t bytes = at * view.kernel_item();
    auto shift = [bytes](const void* p) { return static_cast<const char*>(p) + bytes; };
    worker.block_expert.clear();
    for (const void* expert : worker.tile.expert) worker.block_expert.push_back(shift(expert));
    MapBlock<Work> block;
    block.base = worker.tile.base ? shift(worker.tile.base) : nullptr;
    block.expert = worker.block_expert.data();
    block.out = const_cast<char*>(shift(out));
    block.count = count;
    block.bypass_cache = view.bypass_cache(block.out, view.job().count);
    return block;
  }

  // The plain pass: thresholds (if any) are final.
  void map(const std::vector<Cut>& cuts) {
    const int64_t tile = run_.settings.tile;
    crew_.each(group_.piece_count(tile), [&](int member, int64_t number) {
      Worker& worker = run_.workers[size_t(member)];
      const auto piece = group_.piece(number, tile);
      const JobView& view = group_.views[piece.tensor];
      view.read_ahead(piece.first, tile);
      view.load(worker, piece.first, piece.count);
      void* out = view.result(worker, piece.first, piece.count);
      void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
      const uint64_t flat = group_.flat(piece.tensor, piece.first);
      const MapFn<Work> kernel = kernel_for(view, params_[piece.tensor], Collect::no);
      std::vector<Bits> keep;
      each_segment({&cuts}, flat, piece.count, [&](int64_t begin, int64_t size) {
        thresholds_at(cuts, flat + uint64_t(begin), &keep);
        MapBlock<Work> block = block_at(worker, view, out, begin, size);
        block.index = uint64_t(piece.first + begin);
        block.keep_at = keep.data();
        run_.report.nan += kernel(params_[piece.tensor].block, block, nullptr, scratch);
      });
      view.store(worker, piece.first, piece.count, out);
    });
  }

  // Maps the undecided again, now with the exact cuts, and replaces the results that changed.
  void fix_up(UndecidedStore& store, const std::vector<Cut>& cuts) {
    crew_.each(int64_t(store.chunks().size()), [&](int member, int64_t number) {
      Worker& worker = run_.workers[size_t(member)];
      const Chunk& chunk = *store.chunks()[size_t(number)];
      if (chunk.size == 0) return;
      char* slab = store.open(chunk, worker);
      for (const Span& span : chunk.spans)
        if (span.end > span.begin) fix_up_span(worker, store.layout(), slab, span, cuts);
    });
  }

  void fix_up_span(Worker& worker, const ChunkLayout& layout, char* slab, const Span& span,
                   const std::vector<Cut>& cuts) {
    const JobView& view = group_.views[size_t(span.tensor)];
    const uint64_t flat = group_.flat(size_t(span.tensor), span.origin);
    uint32_t* position = layout.position(slab);
    std::vector<int64_t> stops;  // rows at which some expert's threshold changes
    for (const Cut& cut : cuts)
      if (cut.index > flat && cut.index < flat + uint64_t(span.size))
        stops.push_back(std::lower_bound(position + span.begin, position + span.end, uint32_t(cut.index - flat)) - position);
    stops.push_back(span.end);
    std::sort(stops.begin(), stops.end());
    const size_t item = size_t(view.kernel_item());
    char* fresh = static_cast<char*>(worker.result.reserve(size_t(span.end - span.begin) * item + 64));
    void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
    const MapFn<Work> kernel = kernel_for(view, params_[size_t(span.tensor)], Collect::no);
    std::vector<Bits> keep;
    worker.block_expert.resize(size_t(group_.experts()));
    int64_t nan = 0;
    for (int64_t row = span.begin; int64_t stop : stops) {
      if (stop == row) continue;
      thresholds_at(cuts, flat + position[row], &keep);
      for (int k = 0; k < group_.experts(); ++k) worker.block_expert[size_t(k)] = layout.expert(slab, k) + row * int64_t(item);
      MapBlock<Work> block;
      block.base = layout.base(slab) + row * int64_t(item);
      block.expert = worker.block_expert.data();
      block.out = fresh + (row - span.begin) * int64_t(item);
      block.count = stop - row;
      block.keep_at = keep.data();
      nan += kernel(params_[size_t(span.tensor)].block, block, nullptr, scratch);
      row = stop;
    }
    char* before = layout.provisional(slab) + span.begin * int64_t(item);
    replace_changed(worker, view, span, position + span.begin, before, fresh, nan);
  }

  void replace_changed(Worker& worker, const JobView& view, const Span& span, uint32_t* position, char* before,
                       char* fresh, int64_t fresh_nan) {
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
    run_.report.nan += fresh_nan - nan_before;
    if (!changed) return;
    const uint32_t first = position[0], last = position[changed - 1];
    for (int64_t i = 0; i < changed; ++i) position[i] -= first;
    view.patch(worker, span.origin + first, int64_t(last - first) + 1, position, fresh, changed);
  }

  // The factor that restores each task vector's L1 norm: one more reading, reduced in a fixed order.
  void rescale(const std::vector<Cut>& cuts) {
    const int experts = group_.experts();
    for (size_t t = 0; t < group_.views.size(); ++t) {
      const JobView& view = group_.views[t];
      const int64_t blocks = (view.job().count + kReduceBlock - 1) / kReduceBlock;
      std::vector<double> sums(size_t(blocks * experts) * 2);
      crew_.each(blocks, [&](int member, int64_t number) {
        Worker& worker = run_.workers[size_t(member)];
        const int64_t first = number * kReduceBlock, count = std::min(kReduceBlock, view.job().count - first);
        view.load(worker, first, count);
        for (int k = 0; k < experts; ++k) {
          const Masses m = block_masses(worker, view, t, k, first, count, cuts);
          double* to = &sums[size_t(number * experts + k) * 2];
          to[0] = std::accumulate(m.all, m.all + kVirtualLanes, 0.0);
          to[1] = std::accumulate(m.kept, m.kept + kVirtualLanes, 0.0);
        }
      });
      for (int k = 0; k < experts; ++k) {
        double all = 0, kept = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          all += sums[size_t(b * experts + k) * 2];
          kept += sums[size_t(b * experts + k) * 2 + 1];
        }
        const bool whole = rule_.density[size_t(k)] >= 1;
        params_[t].scale[size_t(k)] = whole || all < 1e-7 || kept < 1e-7 ? Work(1) : Work(all / kept);
      }
    }
  }

  Masses block_masses(Worker& worker, const JobView& view, size_t tensor, int k, int64_t first, int64_t count,
                      const std::vector<Cut>& cuts) {
    Masses sums{};
    if (rule_.density[size_t(k)] >= 1) return sums;
    const uint64_t flat = group_.flat(tensor, first);
    std::vector<Bits> keep;
    each_segment({&cuts}, flat, count, [&](int64_t begin, int64_t size) {
      thresholds_at(cuts, flat + uint64_t(begin), &keep);
      MapBlock<Work> block = block_at(worker, view, nullptr, begin, size);
      block.index = uint64_t(first + begin);
      block.keep_at = cuts.empty() ? nullptr : keep.data();
      group_.kernels(view).masses(params_[tensor].block, block, k, begin, &sums);
    });
    return sums;
  }

  Group<Work>& group_;
  RunContext& run_;
  const Rule& rule_;
  Crew& crew_;
  std::vector<TensorParams<Work>> params_;
  int64_t stream_nan_ = 0;
};

}  // namespace

template <class Work>
void merge_group(Group<Work>& group, Crew& crew) {
  GroupMerge<Work>(group, crew).merge();
}

template void merge_group(Group<float>&, Crew&);
template void merge_group(Group<double>&, Crew&);

}  // namespace pm
