// One pass over a group's inputs under a bracket that closes on the way: counts what reaches each cut, and
// keeps what is undecided.
#pragma once
#include "merge.h"
#include "narrow.h"
#include "pieces.h"

namespace pm {

// What runs over the pieces: a map kernel, whose results are written as if the undecided were trimmed, or the
// search kernel, which has none.
template <class Work>
class Streaming {
  using Bits = typename WorkTraits<Work>::Bits;
  using Piece = typename Group<Work>::Piece;

 public:
  // `params`: of each tensor; null: only search.
  Streaming(const Group<Work>& group, Crew& crew, const std::vector<TensorParams<Work>>* params)
      : group_(group), run_(group.run()), crew_(crew), params_(params) {}

  // How many results are NaN, the undecided left out; counted while `run` goes on.
  int64_t nan() const { return nan_; }

  // Reads every input once. Throws Overflow.
  Counts run(UndecidedStore& store, Bracket* bracket) {
    const int cuts = group_.cuts();
    const int64_t tile = tile_size();
    const Rounds rounds = Rounds::scattered_first(group_.piece_count(tile), kGrowth);
    std::vector<Chunk*> chunks(size_t(crew_.size()), nullptr);
    std::vector<Counts> pieces(size_t(crew_.size()), Counts(cuts));
    Counts sum(cuts);
    int64_t seen = 0;
    for (int round = 0; round < rounds.count(); ++round) {
      std::vector<Counts> counts(size_t(crew_.size()), Counts(cuts));
      Tally tally(cuts, rounds.places(round));
      std::atomic<int64_t> streamed{0};
      each_piece(group_, crew_, rounds, round, tile, [&](int member, int64_t place, const Piece& piece) {
        Worker& worker = run_.workers[size_t(member)];
        const JobView& view = group_.views[piece.tensor];
        Counts& here = pieces[size_t(member)];
        here.clear();
        view.load(worker, piece.first, piece.count);
        void* out = params_ ? view.result(worker.result, piece.first, piece.count) : nullptr;
        nan_ += stream_piece(worker, piece, out, *bracket, store, &chunks[size_t(member)], &here);
        if (params_) view.store(worker, piece.first, piece.count, out);
        tally.add(place, piece.count, here);
        counts[size_t(member)].add(here);
        streamed += piece.count;
      });
      for (const Counts& c : counts) sum.add(c);
      seen += streamed;
      if (round + 1 < rounds.count()) narrow_bracket(group_, crew_, store, tally, seen, bracket, &sum);
    }
    for (Chunk* chunk : chunks)
      if (chunk) store.seal(chunk);
    return sum;
  }

 private:
  // Each round streams three times what was streamed before it. Doubling instead left 6.6 % undecided, not
  // 7.6 %, in files of 1 to 4 M element tensors, but missed where tensors are of very unequal size.
  static constexpr int kGrowth = 2;

  // Smaller tiles for small groups: the bracket closes after the first few, and few must not mean much.
  int64_t tile_size() const {
    constexpr int64_t kPieces = 256, kStep = 2048, kLeast = 8192;  // the least still reads 16 KiB at a time
    const int64_t tile = (int64_t(group_.size) / kPieces + kStep - 1) / kStep * kStep;
    return std::min(run_.settings.tile, std::max(tile, kLeast));
  }

  MapFn<Work> kernel(const Piece& piece, Collect collect) const {
    const JobView& view = group_.views[piece.tensor];
    return params_ ? kernel_for(group_, view, (*params_)[piece.tensor], collect)
                   : group_.kernels(view).search;
  }

  int64_t stream_piece(Worker& worker, const Piece& piece, void* out, const Bracket& bracket,
                       UndecidedStore& store, Chunk** chunk, Counts* counts) {
    const JobView& view = group_.views[piece.tensor];
    const uint64_t flat = group_.flat(piece.tensor, piece.first);
    const bool all_ties = group_.rule().all_ties;
    const MapFn<Work> kernel = this->kernel(piece, all_ties ? Collect::all : Collect::first);
    const MapParams<Work> none, &params = params_ ? (*params_)[piece.tensor].block : none;
    void* scratch = worker.scratch.reserve(map_scratch_bytes(std::max(group_.experts(), group_.cuts())));
    std::vector<Bits> keep, open, count;
    int64_t nan = 0, counted = *chunk ? (*chunk)->size : 0;
    bool new_span = true;
    auto count_opened = [&] {  // of the rows that came to the chunk under one pair of thresholds
      for (int cut = 0; cut < group_.cuts(); ++cut) {
        const Bits low = open[size_t(cut)], high = keep[size_t(cut)];
        if (low < high)
          counts->opened[size_t(cut)] +=
              store.count_open(**chunk, counted, group_.expert_of(cut), group_.kernels(view), low, high);
      }
      counted = (*chunk)->size;
    };
    each_segment({bracket.low, bracket.high}, flat, piece.count, [&](int64_t begin, int64_t size) {
      thresholds_at<Work>(bracket.high, flat + uint64_t(begin), &keep);
      thresholds_at<Work>(bracket.low, flat + uint64_t(begin), &open);
      if (all_ties) {
        count.clear();
        for (const Cut& cut : bracket.high) count.push_back(above<Work>(cut.magnitude));
      }
      for (int64_t at = begin; at < begin + size; at += UndecidedStore::kBlock) {
        const int64_t n = std::min(UndecidedStore::kBlock, begin + size - at);
        if (!*chunk || (*chunk)->size + UndecidedStore::kBlock > store.layout().rows) {
          if (*chunk) count_opened();
          *chunk = store.next(*chunk);
          counted = 0;
          new_span = true;
        }
        if (new_span)
          (*chunk)->spans.push_back(
              {int32_t(piece.tensor), piece.first, piece.count, (*chunk)->size, (*chunk)->size});
        new_span = false;
        MapBlock<Work> block = block_at<Work>(worker, view, out, at, n);
        block.cuts = group_.cuts();
        block.keep_at = keep.data(), block.open_at = open.data();
        block.count_at = all_ties ? count.data() : nullptr;
        block.above = counts->above.data(), block.kept = counts->kept.data();
        uint64_t undecided[UndecidedStore::kBlock / 64] = {};
        block.undecided = undecided;
        nan += kernel(params, block, scratch);
        store.append(*chunk, worker.tile, at, undecided);
      }
      count_opened();
    });
    return nan;
  }

  const Group<Work>& group_;
  RunContext& run_;
  Crew& crew_;
  const std::vector<TensorParams<Work>>* params_;
  std::atomic<int64_t> nan_{0};
};

}  // namespace pm
