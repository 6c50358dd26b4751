// The cuts of a tensor that the cache holds with all its inputs: loaded once, looked through in place.
#include <algorithm>

#include "bracket.h"
#include "merge.h"

namespace pm {

namespace {

// One expert of the loaded tensor.
template <class Work>
class WholeExpert {
  using Bits = typename WorkTraits<Work>::Bits;

 public:
  WholeExpert(const Group<Work>& group, const Tile& tile, int expert, Worker& worker)
      : group_(group),
        kernels_(group.kernels(group.views[0])),
        base_(tile.base),
        expert_(tile.expert[size_t(expert)]),
        size_(int64_t(group.size)),
        worker_(worker) {}

  Cut cut(int64_t rank) {
    if (rank < 0) return Cut::keep_all();
    if (rank == 0) return Cut::keep_none();
    Cut found;
    if (size_ < kFew || !bracketed(rank, &found)) return among_all(rank);
    return found;
  }

 private:
  // Elements: of fewer all are sorted out, which costs less than to sample.
  static constexpr int64_t kFew = 1024;
  // Elements: of fewer clusters of 64, eight at least, would be too large a sample.
  static constexpr int64_t kShort = 16384;

  // By a sample, and those keys that it leaves open; false if the bracket missed.
  bool bracketed(int64_t rank, Cut* found) {
    const Samples samples = choose_samples(group_.size, size_ < kShort ? 32 : 64, size_);
    Bits* sampled = worker_.keys.template reserve_for<Bits>(size_t(samples.size()));
    for (int64_t c = 0; c < samples.clusters; ++c) {
      const int64_t first = int64_t(samples.start[size_t(c)]);
      const auto at = [this, first](const void* p) { return group_.views[0].shifted(p, first); };
      kernels_.keys(at(base_), at(expert_), samples.length, sampled + c * samples.length);
    }
    const Settings& settings = group_.run().settings;
    const CutBracket bracket = SampledKeys<Bits>(sampled, samples, worker_.words)
                                   .around(double(rank) / double(size_) + settings.bracket_bias,
                                           settings.sigmas, group_.rule().all_ties);
    const size_t room = size_t(size_ + kMaxGroup);
    OpenKeys<Bits> open{worker_.keys.template reserve_for<Bits>(room),
                        worker_.scores.template reserve_for<uint32_t>(room), 0, 0};
    const int64_t surely = kernels_.open_keys(base_, expert_, size_, Bits(bracket.low.magnitude),
                                              above<Work>(bracket.high.magnitude), &open);
    if (rank > surely && rank <= surely + open.size) {
      const PlacedKey<Bits> last = ranked(open.key, open.size, rank - surely);
      *found = cut_after(last.key(last), open.position[last.place()]);
      return true;
    }
    // Where zeros are cut does not matter, unless they are multiplied by an infinite scale.
    if (rank > surely && bracket.low.keeps_nonzero() && !group_.rule().rescale) {
      *found = bracket.low;
      return true;
    }
    group_.run().report.misses += 1;
    return false;
  }

  Cut among_all(int64_t rank) {
    Bits* keys = worker_.keys.template reserve_for<Bits>(size_t(size_));
    kernels_.keys(base_, expert_, size_, keys);
    const PlacedKey<Bits> last = ranked(keys, size_, rank);
    return cut_after(last.key(last), uint32_t(last.place()));
  }

  Cut cut_after(Bits key, uint32_t last) const {
    return {key, group_.rule().all_ties ? Cut::kAllIndices : uint64_t(last) + 1};
  }
  PlacedKey<Bits> ranked(const Bits* keys, int64_t size, int64_t rank) {
    return KeyRanking<Bits>(keys, size, worker_.words.reserve(KeyRanking<Bits>::bytes(size))).at(rank);
  }

  const Group<Work>& group_;
  const KernelSet<Work>& kernels_;
  const void *base_, *expert_;
  const int64_t size_;
  Worker& worker_;
};

}  // namespace

template <class Work>
Tile load_whole(const Group<Work>& group, Crew& crew) {
  Worker& worker = group.run().workers[size_t(crew.size() - 1)];
  group.views[0].load(worker, 0, int64_t(group.size));
  return worker.tile;
}

template <class Work>
std::vector<Cut> whole_cuts(const Group<Work>& group, const Tile& tile, Crew& crew) {
  std::vector<Cut> cuts(size_t(group.cuts()));
  crew.each(group.cuts(), [&](int member, int64_t cut) {
    WholeExpert<Work> expert(group, tile, group.expert_of(int(cut)), group.run().workers[size_t(member)]);
    cuts[size_t(cut)] = expert.cut(group.rank(int(cut)));
  });
  return cuts;
}

template Tile load_whole(const Group<float>&, Crew&);
template Tile load_whole(const Group<double>&, Crew&);
template std::vector<Cut> whole_cuts(const Group<float>&, const Tile&, Crew&);
template std::vector<Cut> whole_cuts(const Group<double>&, const Tile&, Crew&);

}  // namespace pm
