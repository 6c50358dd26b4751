#include "bracket.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "../core/bracket.h"
#include "../core/rounds.h"

namespace pm {

namespace {

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

constexpr int64_t kMostSampleBytes = 64 << 20;  // of the keys of all experts

}  // namespace

Samples choose_samples(uint64_t size, int64_t length, int64_t most) {
  Samples s;
  s.length = length;
  const int64_t wanted = std::min<int64_t>(most, int64_t(2 * std::pow(double(size), 2.0 / 3)));
  s.clusters = std::max<int64_t>(8, wanted / s.length);
  s.clusters = std::max<int64_t>(1, std::min<int64_t>(s.clusters, int64_t(size) / s.length));
  const uint64_t stratum = size / uint64_t(s.clusters);
  for (int64_t c = 0; c < s.clusters; ++c) {
    const uint64_t room = stratum - uint64_t(s.length) + 1;
    s.start.push_back(uint64_t(c) * stratum + scatter(uint64_t(c)) % room / 32 * 32);
  }
  return s;
}

template <class Bits>
SampledKeys<Bits>::SampledKeys(const Bits* keys, const Samples& samples, Buffer& memory)
    : keys_(keys),
      samples_(samples),
      ranking_(keys, samples.size(), memory.reserve(KeyRanking<Bits>::bytes(samples.size()))) {}

template <class Bits>
CutBracket SampledKeys<Bits>::around(double share, double sigmas, bool all_ties) {
  const int64_t total = samples_.size();
  auto cut_at = [&](int64_t rank) -> Cut {
    const PlacedKey<Bits> last = ranking_.at(rank);
    return {last.key(last), all_ties ? Cut::kAllIndices : samples_.index(last.place()) + 1};
  };
  const double centre = std::clamp(share * double(total), 1.0, double(total));
  const PlacedKey<Bits> middle = ranking_.at(int64_t(centre));
  const double half = sigmas * rank_error(keys_, samples_, middle.key(middle), middle.place()) + 1;
  const Ends ends = ends_around(centre, half);
  const auto high = int64_t(ends.high), low = int64_t(ends.low);
  return {low > total ? Cut::keep_nonzero() : cut_at(low).without_zeros(),
          high < 1 ? Cut::keep_none() : cut_at(high).without_zeros()};
}

template <class Work>
Bracket sample_bracket(const Group<Work>& group, Crew& crew) {
  using Bits = typename WorkTraits<Work>::Bits;
  constexpr int64_t kMostSamples = 1 << 14;  // the first round of a stream needs no more
  const int experts = group.experts();
  const bool in_files = group.views[0].job().input[0].file != kInMemory;
  const int64_t affordable = kMostSampleBytes / (experts * int64_t(sizeof(Work)));
  const Samples samples = choose_samples(group.size, in_files ? 256 : 64, std::min(kMostSamples, affordable));
  std::vector<std::vector<Bits>> keys(static_cast<size_t>(experts));
  for (int cut = 0; cut < group.cuts(); ++cut)
    if (group.rank(cut) > 0) keys[size_t(group.expert_of(cut))].resize(size_t(samples.size()));

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
  crew.each(experts, [&](int member, int64_t k) {
    std::optional<SampledKeys<Bits>> sampled;
    if (!keys[size_t(k)].empty())
      sampled.emplace(keys[size_t(k)].data(), samples, group.run().workers[size_t(member)].words);
    for (size_t cut = size_t(k); cut < cuts; cut += size_t(experts)) {
      const int64_t kept = group.rank(int(cut));
      Cut &low = bracket.low[cut], &high = bracket.high[cut];
      low = high = kept < 0 ? Cut::keep_all() : Cut::keep_none();
      if (kept <= 0) continue;
      const double share = double(kept) / double(group.size) + settings.bracket_bias;
      const CutBracket found = sampled->around(share, settings.sigmas, group.rule().all_ties);
      low = found.low, high = found.high;
    }
  });
  return bracket;
}

template class SampledKeys<uint32_t>;
template class SampledKeys<uint64_t>;
template Bracket sample_bracket(const Group<float>&, Crew&);
template Bracket sample_bracket(const Group<double>&, Crew&);

}  // namespace pm
