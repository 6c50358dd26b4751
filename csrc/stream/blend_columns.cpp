// Blend by columns: a stripe of columns at a time, twice down all rows; plain loops, for a rare wish.
#include "merge.h"

namespace pm {

namespace {

constexpr int64_t kStripe = 1024;     // columns at a time: 2 KiB of a row in bf16
constexpr int64_t kTogether = 16384;  // elements: narrow rows are read several at a time

template <class Work>
class ColumnMerge {
 public:
  ColumnMerge(const Group<Work>& group, Crew& crew)
      : group_(group), view_(group.views[0]), crew_(crew), inputs_(group.experts()) {}

  void merge() {
    const int64_t width = view_.job().row, stripes = (width + kStripe - 1) / kStripe;
    crew_.each(stripes, [&](int member, int64_t number) {
      const int64_t left = number * kStripe;
      blend_stripe(group_.run().workers[size_t(member)], left, std::min(kStripe, width - left));
    });
  }

 private:
  static constexpr DType kWork = sizeof(Work) == 8 ? DType::f64 : DType::f32;

  // Elements of some rows of the stripe in the working type; task vectors where there is a base.
  struct Rows {
    std::vector<Work> base;
    std::vector<std::vector<Work>> input;
  };

  void blend_stripe(Worker& worker, int64_t left, int64_t width) {
    const int pairs = pair_count(inputs_);
    const size_t plane = size_t(pairs) * size_t(width);
    std::vector<double> lanes(plane * kVirtualLanes), total(plane);
    each_rows(worker, left, width, [&](int64_t row, int64_t count, Rows& rows) {
      for (int64_t r = 0; r < count; ++r) {
        double* to = &lanes[size_t((row + r) % kVirtualLanes) * plane];
        for (int i = 0; i < inputs_; ++i)
          for (int j = i; j < inputs_; ++j, to += width)
            for (int64_t c = 0; c < width; ++c)
              to[c] += double(rows.input[size_t(i)][size_t(r * width + c)]) *
                       double(rows.input[size_t(j)][size_t(r * width + c)]);
        if ((row + r + 1) % kReduceBlock == 0) add_lanes(&lanes, &total);
      }
    });
    add_lanes(&lanes, &total);
    const std::vector<Work> weight = weights(total, width);
    std::vector<Work> merged;
    each_rows(worker, left, width, [&](int64_t row, int64_t count, Rows& rows) {
      merged.assign(size_t(count * width), Work(0));
      for (int k = 0; k < inputs_; ++k)
        for (int64_t at = 0; at < count * width; ++at)
          merged[size_t(at)] += rows.input[size_t(k)][size_t(at)] * weight[size_t(k * width + at % width)];
      for (size_t at = 0; at < rows.base.size(); ++at) merged[at] = rows.base[at] + merged[at];
      store(worker, row * view_.job().row + left, merged);
    });
  }

  // A block's lanes join the total in their order; then they start anew.
  static void add_lanes(std::vector<double>* lanes, std::vector<double>* total) {
    const size_t plane = total->size();
    for (size_t at = 0; at < plane; ++at) {
      double block = 0;
      for (int lane = 0; lane < kVirtualLanes; ++lane) block += (*lanes)[size_t(lane) * plane + at];
      (*total)[at] += block;
    }
    std::fill(lanes->begin(), lanes->end(), 0.0);
  }

  std::vector<Work> weights(const std::vector<double>& total, int64_t width) const {
    std::vector<Work> weight(size_t(inputs_ * width));
    Gram gram(inputs_);
    for (int64_t c = 0; c < width; ++c) {
      gram.fill([&](size_t pair) { return total[pair * size_t(width) + size_t(c)]; });
      const Coefficients found = group_coefficients(group_, gram);
      for (int k = 0; k < inputs_; ++k) weight[size_t(k * width + c)] = Work(found[size_t(k)]);
    }
    return weight;
  }

  // body(first row, rows, their elements) from the first row to the last.
  template <class F>
  void each_rows(Worker& worker, int64_t left, int64_t width, F&& body) {
    const int64_t row = view_.job().row, all = view_.job().count / row;
    const int64_t step = width == row ? std::max<int64_t>(1, kTogether / row) : 1;
    Rows rows;
    rows.input.resize(size_t(inputs_));
    for (int64_t first = 0; first < all; first += step) {
      const int64_t count = std::min(step, all - first);
      view_.load(worker, first * row + left, count * width);
      if (worker.tile.base) widen(worker.tile.base, count * width, &rows.base);
      for (int k = 0; k < inputs_; ++k) {
        std::vector<Work>& x = rows.input[size_t(k)];
        widen(worker.tile.expert[size_t(k)], count * width, &x);
        for (size_t at = 0; at < rows.base.size(); ++at) x[at] = x[at] - rows.base[at];
      }
      body(first, count, rows);
    }
  }

  void widen(const void* from, int64_t count, std::vector<Work>* to) const {
    to->resize(size_t(count));
    convert(group_.run().settings.isa, view_.kernel_dtype(), kWork, from, to->data(), count);
  }

  void store(Worker& worker, int64_t first, const std::vector<Work>& merged) const {
    const int64_t count = int64_t(merged.size());
    void* out = view_.result(worker.result, first, count);
    convert(group_.run().settings.isa, kWork, view_.kernel_dtype(), merged.data(), out, count);
    group_.count_nan(std::count_if(merged.begin(), merged.end(), [](Work x) { return x != x; }));
    view_.store(worker, first, count, out);
  }

  const Group<Work>& group_;
  const JobView& view_;
  Crew& crew_;
  const int inputs_;
};

}  // namespace

template <class Work>
void blend_columns(const Group<Work>& group, Crew& crew) {
  ColumnMerge<Work>(group, crew).merge();
}

template void blend_columns(const Group<float>&, Crew&);
template void blend_columns(const Group<double>&, Crew&);

}  // namespace pm
