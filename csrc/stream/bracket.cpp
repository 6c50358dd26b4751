#include "bracket.h"

#include <algorithm>
#include <cmath>

#include "../core/bracket.h"
#include "../core/rounds.h"

namespace pm {

namespace {

// Per expert. The sample serves only the first round of the stream, so a rough one will do.
constexpr int64_t kMostSamples = 1 << 14;

struct Samples {
  int64_t clusters, length;     // `length` neighbours are read together
  std::vector<uint64_t> start;  // flat index of each cluster, ascending
  uint64_t index(int64_t i) const { return start[size_t(i / length)] + uint64_t(i % length); }
};

// One cluster at a scattered place in each of equally long strata. In small groups the sample grows with
// n^(2/3), where its cost and the cost of the undecided it leaves balance.
template <class Work>
Samples choose_samples(const Group<Work>& group) {
  const bool in_files = group.views[0].job().input[0].file != kInMemory;
  Samples s;
  s.length = in_files ? 256 : 64;
  const int64_t wanted = std::min<int64_t>(kMostSamples, int64_t(2 * std::pow(double(group.size), 2.0 / 3)));
  const int64_t affordable = (int64_t(64) << 20) / (group.experts() * int64_t(sizeof(Work)));
  s.clusters = std::max<int64_t>(8, std::min(wanted, affordable) / s.length);
  s.clusters = std::max<int64_t>(1, std::min<int64_t>(s.clusters, int64_t(group.size) / s.length));
  const uint64_t stratum = group.size / uint64_t(s.clusters);
  for (int64_t c = 0; c < s.clusters; ++c) {
    const uint64_t room = stratum - uint64_t(s.length) + 1;
    s.start.push_back(uint64_t(c) * stratum + scatter(uint64_t(c)) % room / 32 * 32);
  }
  return s;
}

// Standard error, in samples, of how many are kept if those equal to `key` are up to `last_equal`.
template <class Bits>
double rank_error(const Bits* keys, const Samples& s, Bits key, int64_t last_equal) {
  double squares = 0;
  int64_t last = 0;
  for (int64_t c = 0; c < s.clusters; ++c) {
    int64_t above = 0;
    for (int64_t j = 0; j < s.length; ++j) {
      const int64_t i = c * s.length + j;
      above += keys[i] > key || (keys[i] == key && i <= last_equal);
    }
    if (c) squares += double((above - last) * (above - last));
    last = above;
  }
  return count_error(squares, double(s.clusters));
}

}  // namespace

template <class Work>
Bracket sample_bracket(const Group<Work>& group, Crew& crew) {
  using Bits = typename WorkTraits<Work>::Bits;
  const int experts = group.experts();
  const Samples samples = choose_samples(group);
  const int64_t total = samples.clusters * samples.length;
  std::vector<std::vector<Bits>> keys(static_cast<size_t>(experts));
  for (int cut = 0; cut < group.cuts(); ++cut)
    if (group.rank(cut) > 0) keys[size_t(group.expert_of(cut))].resize(size_t(total));

  constexpr int64_t kBatch = 64;
  crew.each((samples.clusters + kBatch - 1) / kBatch, [&](int member, int64_t batch) {
    Worker& worker = group.run().workers[size_t(member)];
    for (int64_t c = batch * kBatch; c < std::min(samples.clusters, (batch + 1) * kBatch); ++c) {
      uint64_t flat = samples.start[size_t(c)];
      size_t tensor =
          size_t(std::upper_bound(group.origins.begin(), group.origins.end(), flat) - group.origins.begin()) -
          1;
      for (int64_t done = 0; done < samples.length; ++tensor) {
        const JobView& view = group.views[tensor];
        const int64_t first = int64_t(flat - group.origins[tensor]);
        const int64_t count = std::min(samples.length - done, view.job().count - first);
        if (count <= 0) continue;
        view.load(worker, first, count);
        for (int k = 0; k < experts; ++k)
          if (!keys[size_t(k)].empty())
            group.kernels(view).keys(worker.tile.base, worker.tile.expert[size_t(k)], count,
                                     keys[size_t(k)].data() + c * samples.length + done);
        done += count, flat += uint64_t(count);
      }
    }
  });

  const size_t cuts = size_t(group.cuts());
  Bracket bracket{std::vector<Cut>(cuts), std::vector<Cut>(cuts)};
  const Settings& settings = group.run().settings;
  const bool all_ties = group.rule().all_ties;
  crew.each(group.cuts(), [&](int, int64_t number) {
    const int64_t kept = group.rank(int(number));
    Cut &low = bracket.low[size_t(number)], &high = bracket.high[size_t(number)];
    low = high = kept < 0 ? Cut::keep_all() : Cut::keep_none();
    if (kept <= 0) return;
    const std::vector<Bits>& sample = keys[size_t(group.expert_of(int(number)))];
    Ranking<Bits> ranking(sample.data(), total);
    auto cut_at = [&](int64_t rank) -> Cut {
      const auto [key, place] = ranking.at(rank);
      return {key, all_ties ? Cut::kAllIndices : samples.index(place) + 1};
    };
    const double share = double(kept) / double(group.size) + settings.bracket_bias;
    const double centre = std::clamp(share * double(total), 1.0, double(total));
    const auto [middle, last] = ranking.at(int64_t(centre));
    const double half = settings.sigmas * rank_error(sample.data(), samples, middle, last) + 1;
    const Ends ends = ends_around(centre, half);
    const auto high_rank = int64_t(ends.high), low_rank = int64_t(ends.low);
    high = high_rank < 1 ? Cut::keep_none() : cut_at(high_rank).without_zeros();
    low = low_rank > total ? Cut::keep_nonzero() : cut_at(low_rank).without_zeros();
  });
  return bracket;
}

template Bracket sample_bracket(const Group<float>&, Crew&);
template Bracket sample_bracket(const Group<double>&, Crew&);

}  // namespace pm
