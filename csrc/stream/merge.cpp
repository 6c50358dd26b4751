#include "merge.h"

#include <algorithm>

#include "../core/rounds.h"
#include "narrow.h"

namespace pm {

namespace {

// Each round streams three times what was streamed before it. Doubling instead left 6.6 % undecided, not 7.6
// %, in files of 1 to 4 M element tensors, but missed where tensors are of very unequal size.
constexpr int kGrowth = 2;
constexpr uint64_t kSmallGroup = 16384;  // elements up to which sorting out all keys is cheaper than sampling

template <class Work>
class GroupMerge {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  GroupMerge(Group<Work>& group, Crew& crew)
      : group_(group), run_(group.run()), rule_(group.rule()), crew_(crew) {
    params_.reserve(group.views.size());
    for (size_t t = 0; t < group.views.size(); ++t) params_.emplace_back(rule_);
  }

  void merge() {
    if (!by_magnitude(rule_.trim) || !group_.trims()) return map({});
    if (!run_.cuts[size_t(group_.number)].empty()) return finish(run_.cuts[size_t(group_.number)]);
    run_.report.searched += 1;
    if (group_.size <= kSmallGroup || !searched()) return finish(small_cuts());
    Bracket bracket = sample_bracket(group_, crew_);
    try {
      UndecidedStore store(run_, group_.experts(), group_.views[0].kernel_item());
      const Counts counts = stream(store, &bracket);
      std::vector<Cut> cuts;
      if (select_cuts(group_, crew_, store, bracket, counts, &cuts)) {
        run_.report.undecided += store.rows();
        run_.cuts[size_t(group_.number)] = cuts;
        if (!rule_.rescale) return fix_up(group_, crew_, store, cuts, params_);
        forget_output();
        rescale(group_, crew_, cuts, &params_);
        if (scales_finite()) return map(cuts);
        return finish(exact_cuts(group_, crew_));  // a zero times an infinite scale counts: its index matters
      }
      run_.report.misses += 1;
    } catch (const Overflow&) {
      run_.report.overflows += 1;
    }
    forget_output();
    finish(exact_cuts(group_, crew_));
  }

 private:
  // Whether any cut lies among the entries.
  bool searched() const {
    for (int cut = 0; cut < group_.cuts(); ++cut)
      if (group_.rank(cut) > 0) return true;
    return false;
  }

  bool scales_finite() const {
    for (const auto& p : params_)
      for (Work scale : p.scale)
        if (!std::isfinite(scale)) return false;
    return true;
  }

  // A second reading starts over: what the abandoned pass counted does not count.
  void forget_output() {
    run_.report.nan -= stream_nan_;
    stream_nan_ = 0;
  }

  void finish(const std::vector<Cut>& cuts) {
    run_.cuts[size_t(group_.number)] = cuts;
    if (rule_.rescale) rescale(group_, crew_, cuts, &params_);
    map(cuts);
  }

  std::vector<Cut> small_cuts() {
    const int experts = group_.experts();
    std::vector<Cut> cuts(static_cast<size_t>(group_.cuts()), Cut::keep_all());
    for (int cut = 0; cut < group_.cuts(); ++cut)
      if (group_.rank(cut) == 0) cuts[size_t(cut)] = Cut::keep_none();
    if (!searched()) return cuts;
    std::vector<std::vector<Bits>> keys(static_cast<size_t>(experts), std::vector<Bits>(group_.size));
    Worker& worker = run_.workers[size_t(crew_.size() - 1)];
    for (size_t t = 0; t < group_.views.size(); ++t) {
      const JobView& view = group_.views[t];
      view.load(worker, 0, view.job().count);
      for (int k = 0; k < experts; ++k)
        group_.kernels(view).keys(worker.tile.base, worker.tile.expert[size_t(k)], view.job().count,
                                  keys[size_t(k)].data() + group_.origins[t]);
    }
    for (int cut = 0; cut < group_.cuts(); ++cut) {
      if (group_.rank(cut) <= 0) continue;
      const Bits* key_of = keys[size_t(group_.expert_of(cut))].data();
      const auto [key, last] = Ranking<Bits>(key_of, int64_t(group_.size)).at(group_.rank(cut));
      cuts[size_t(cut)] = {key, rule_.all_ties ? Cut::kAllIndices : uint64_t(last) + 1};
    }
    return cuts;
  }

  // Reads every input once; writes the output as if the undecided were trimmed. Closes the bracket on the
  // way.
  Counts stream(UndecidedStore& store, Bracket* bracket) {
    const int cuts = group_.cuts();
    const int64_t tile = stream_tile();
    const Rounds rounds = Rounds::scattered_first(group_.piece_count(tile), kGrowth);
    std::vector<Chunk*> chunks(size_t(crew_.size()), nullptr);
    std::vector<Counts> pieces(size_t(crew_.size()), Counts(cuts));
    Counts sum(cuts);
    int64_t seen = 0;
    for (int round = 0; round < rounds.count(); ++round) {
      std::vector<Counts> counts(size_t(crew_.size()), Counts(cuts));
      Tally tally(cuts, rounds.places(round));
      std::atomic<int64_t> streamed{0}, nan{0};
      each_piece(rounds, round, tile, [&](int member, int64_t place, const auto& piece) {
        Worker& worker = run_.workers[size_t(member)];
        const JobView& view = group_.views[piece.tensor];
        Counts& here = pieces[size_t(member)];
        here.clear();
        view.load(worker, piece.first, piece.count);
        void* out = view.result(worker, piece.first, piece.count);
        nan += stream_piece(worker, piece, out, *bracket, store, &chunks[size_t(member)], &here);
        view.store(worker, piece.first, piece.count, out);
        tally.add(place, piece.count, here);
        counts[size_t(member)].add(here);
        streamed += piece.count;
      });
      for (const Counts& c : counts) sum.add(c);
      stream_nan_ += nan;
      run_.report.nan += nan;  // now, as a later round may overflow: forget_output takes back what is counted
      seen += streamed;
      if (round + 1 < rounds.count()) narrow_bracket(group_, crew_, store, tally, seen, bracket, &sum);
    }
    for (Chunk* chunk : chunks)
      if (chunk) store.seal(chunk);
    return sum;
  }

  // Smaller tiles for small groups: the bracket closes after the first few, and few must not mean much.
  int64_t stream_tile() const {
    constexpr int64_t kPieces = 256, kStep = 2048, kLeast = 8192;  // the least still reads 16 KiB at a time
    const int64_t tile = (int64_t(group_.size) / kPieces + kStep - 1) / kStep * kStep;
    return std::min(run_.settings.tile, std::max(tile, kLeast));
  }

  // body(member, place, piece) for every piece of a round, with the reading of what follows asked for ahead.
  template <class F>
  void each_piece(const Rounds& rounds, int round, int64_t tile, F&& body) {
    crew_.each(rounds.places(round), [&](int member, int64_t place) {
      read_ahead(rounds, round, tile, place);
      const int64_t number = rounds.piece(round, place);
      if (number < rounds.pieces()) body(member, place, group_.piece(number, tile));
    });
  }

  void read_ahead(const Rounds& rounds, int round, int64_t tile, int64_t place) {
    constexpr int64_t kWindow = 32;  // pieces: 2 MiB of each bf16 input at the default tile
    if (place % kWindow) return;
    const int64_t end = std::min(place + 2 * kWindow, rounds.places(round));
    typename Group<Work>::Piece range{0, 0, 0};
    for (int64_t next = place ? place + kWindow : 0; next < end; ++next) {
      const int64_t number = rounds.piece(round, next);
      if (number >= rounds.pieces()) break;
      const auto piece = group_.piece(number, tile);
      // A gap of a piece is what an earlier round has read: to ask for it again costs nothing.
      const bool joins = piece.tensor == range.tensor && piece.first <= range.first + range.count + tile;
      if (range.count && !joins) group_.views[range.tensor].will_need(range.first, range.count);
      range = joins && range.count ? range : piece;
      range.count = piece.first + piece.count - range.first;
    }
    if (range.count) group_.views[range.tensor].will_need(range.first, range.count);
  }

  int64_t stream_piece(Worker& worker, const typename Group<Work>::Piece& piece, void* out,
                       const Bracket& bracket, UndecidedStore& store, Chunk** chunk, Counts* counts) {
    const JobView& view = group_.views[piece.tensor];
    const uint64_t flat = group_.flat(piece.tensor, piece.first);
    const Collect collect = rule_.all_ties ? Collect::all : Collect::first;
    const MapFn<Work> kernel = kernel_for(group_, view, params_[piece.tensor], collect);
    const MapParams<Work>& params = params_[piece.tensor].block;
    void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
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
      if (collect == Collect::all) {
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
        block.keep_at = keep.data(), block.open_at = open.data(), block.count_at = count.data();
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

  // The plain pass: thresholds (if any) are final.
  void map(const std::vector<Cut>& cuts) {
    const int64_t tile = run_.settings.tile;
    const Rounds rounds = Rounds::in_order(group_.piece_count(tile));
    each_piece(rounds, 0, tile, [&](int member, int64_t, const auto& piece) {
      Worker& worker = run_.workers[size_t(member)];
      const JobView& view = group_.views[piece.tensor];
      view.load(worker, piece.first, piece.count);
      void* out = view.result(worker, piece.first, piece.count);
      void* scratch = worker.scratch.reserve(map_scratch_bytes(group_.experts()));
      const uint64_t flat = group_.flat(piece.tensor, piece.first);
      const MapFn<Work> kernel = kernel_for(group_, view, params_[piece.tensor], Collect::no);
      std::vector<Bits> keep;
      each_segment({cuts}, flat, piece.count, [&](int64_t begin, int64_t size) {
        thresholds_at<Work>(cuts, flat + uint64_t(begin), &keep);
        MapBlock<Work> block = block_at<Work>(worker, view, out, begin, size);
        block.keep_at = keep.data();
        run_.report.nan += kernel(params_[piece.tensor].block, block, scratch);
      });
      view.store(worker, piece.first, piece.count, out);
    });
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
