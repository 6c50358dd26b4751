// Blend: two readings of the inputs, one for the Gram matrix and one for the linear map; short vectors need
// only one.
#include "merge.h"

namespace pm {

namespace {

constexpr int64_t kReadOnce = 32768;   // elements: whole vectors of up to so many are blended while in cache
constexpr int64_t kBlocksAtOnce = 64;  // per worker: their sums wait for their turn to be added

template <class Work>
class BlendMerge {
 public:
  BlendMerge(const Group<Work>& group, Crew& crew)
      : group_(group), run_(group.run()), view_(group.views[0]), crew_(crew), inputs_(group.experts()) {}

  void merge() {
    const int64_t count = view_.job().count;
    const bool rows = group_.rule().blend.vectors == Vectors::rows && view_.job().row > 0;
    const int64_t length = rows ? view_.job().row : count;
    if (length <= kReadOnce) return blend_short(length);
    for (int64_t first = 0; first < count; first += length) blend_long(first, length);
  }

 private:
  using Params = TensorParams<Work>;

  Params linear_map() const {
    Params params(group_.rule());
    params.block.normalize = false;
    return params;
  }

  void blend_short(int64_t length) {
    const int64_t size = std::max<int64_t>(1, kReadOnce / length) * length, count = view_.job().count;
    crew_.each((count + size - 1) / size, [&](int member, int64_t number) {
      Worker& worker = run_.workers[size_t(member)];
      const int64_t first = number * size, here = std::min(size, count - first);
      view_.load(worker, first, here);
      void* out = view_.result(worker.result, first, here);
      Params params = linear_map();
      std::vector<double> lanes(lane_count());
      for (int64_t at = 0; at < here; at += length) {
        std::fill(lanes.begin(), lanes.end(), 0.0);
        add_products(worker, at, length, &lanes);
        std::vector<double> products(size_t(pairs()), 0.0);
        add_lanes(lanes, products.data());
        set_weights(products, &params);
        map(worker, params, out, at, length);
      }
      view_.store(worker, first, here, out);
    });
  }

  void blend_long(int64_t first, int64_t length) {
    Params params = linear_map();
    set_weights(products_of(first, length), &params);
    const int64_t tile = run_.settings.tile, end = first + length;
    crew_.each((length + tile - 1) / tile, [&](int member, int64_t number) {
      Worker& worker = run_.workers[size_t(member)];
      const int64_t at = first + number * tile, here = std::min(tile, end - at);
      ask_ahead(at, tile, end);
      view_.load(worker, at, here);
      void* out = view_.result(worker.result, at, here);
      map(worker, params, out, 0, here);
      view_.store(worker, at, here, out);
    });
  }

  // The inner products of a long vector's inputs: blocks side by side, added up in their order.
  std::vector<double> products_of(int64_t first, int64_t length) {
    const int64_t blocks = (length + kReduceBlock - 1) / kReduceBlock, end = first + length;
    const int64_t at_once = kBlocksAtOnce * crew_.size();
    std::vector<double> total(size_t(pairs()), 0.0), sums(size_t(std::min(blocks, at_once) * pairs()));
    for (int64_t begin = 0; begin < blocks; begin += at_once) {
      const int64_t some = std::min(at_once, blocks - begin);
      std::fill(sums.begin(), sums.end(), 0.0);
      crew_.each(some, [&](int member, int64_t number) {
        const int64_t at = first + (begin + number) * kReduceBlock;
        const int64_t here = std::min(kReduceBlock, end - at);
        ask_ahead(at, kReduceBlock, end);
        add_lanes(lanes_of(run_.workers[size_t(member)], at, here), &sums[size_t(number * pairs())]);
      });
      for (int64_t b = 0; b < some; ++b)
        for (int64_t p = 0; p < pairs(); ++p) total[size_t(p)] += sums[size_t(b * pairs() + p)];
    }
    return total;
  }

  std::vector<double> lanes_of(Worker& worker, int64_t first, int64_t count) {
    std::vector<double> lanes(lane_count(), 0.0);
    const int64_t tile = run_.settings.tile;
    for (int64_t at = 0; at < count; at += tile) {
      const int64_t here = std::min(tile, count - at);
      view_.load(worker, first + at, here);
      add_products(worker, 0, here, &lanes);
    }
    return lanes;
  }

  // Adds the products of `count` elements of the loaded tile, from `at`; the first belongs to lane 0.
  void add_products(Worker& worker, int64_t at, int64_t count, std::vector<double>* lanes) {
    const MapBlock<Work> block = block_at<Work>(worker, view_, nullptr, at, count);
    double* scratch = worker.scratch.reserve_for<double>(gram_scratch(inputs_));
    group_.kernels(view_).gram(block.base, block.expert, inputs_, count, lanes->data(), scratch);
  }

  // Adds the lanes of a block in their order to `to`, which starts at zero.
  void add_lanes(const std::vector<double>& lanes, double* to) const {
    for (int64_t p = 0; p < pairs(); ++p)
      for (int lane = 0; lane < kVirtualLanes; ++lane) to[p] += lanes[size_t(p * kVirtualLanes + lane)];
  }

  void set_weights(const std::vector<double>& products, Params* params) const {
    Gram gram(inputs_);
    gram.fill([&](size_t pair) { return products[pair]; });
    const Coefficients found = group_coefficients(group_, gram);
    for (size_t k = 0; k < found.size(); ++k) params->weight[k] = Work(found[k]);
  }

  void map(Worker& worker, const Params& params, void* out, int64_t at, int64_t count) {
    void* scratch = worker.scratch.reserve(map_scratch_bytes(inputs_));
    const KernelSet<Work>& kernels = group_.kernels(view_);
    const MapBlock<Work> block = block_at<Work>(worker, view_, out, at, count);
    group_.count_nan((block.base ? kernels.sum : kernels.linear)(params.block, block, scratch));
  }

  void ask_ahead(int64_t first, int64_t size, int64_t end) const {
    const int64_t next = first + size * crew_.size();
    if (next < end) view_.will_need(next, std::min(size, end - next));
  }

  int64_t pairs() const { return pair_count(inputs_); }
  size_t lane_count() const { return size_t(pairs()) * kVirtualLanes; }

  const Group<Work>& group_;
  RunContext& run_;
  const JobView& view_;
  Crew& crew_;
  const int inputs_;
};

}  // namespace

template <class Work>
Coefficients group_coefficients(const Group<Work>& group, const Gram& gram) {
  const Rule& rule = group.rule();
  Coefficients found = coefficients(rule.blend, gram, rule.weight, rule.normalize);
  if (found.empty())
    throw StreamError(group.views[0].number(), 0,
                      "the weighted directions of the inputs cancel, so they have no mean; change a weight");
  return found;
}

template <class Work>
void blend_group(const Group<Work>& group, Crew& crew) {
  const bool columns = group.rule().blend.vectors == Vectors::columns && group.views[0].job().row > 1;
  columns ? blend_columns(group, crew) : BlendMerge<Work>(group, crew).merge();
}

template Coefficients group_coefficients(const Group<float>&, const Gram&);
template Coefficients group_coefficients(const Group<double>&, const Gram&);
template void blend_group(const Group<float>&, Crew&);
template void blend_group(const Group<double>&, Crew&);

}  // namespace pm
