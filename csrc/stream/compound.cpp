#include "compound.h"

#include <fcntl.h>
#include <string.h>

#include <algorithm>

#include "tile.h"

namespace pm {

namespace {

constexpr int64_t kStep = 32768;         // elements at a time where all of a tensor is needed
constexpr int64_t kLeastAdvice = 65536;  // bytes below which asking ahead costs more than it saves

// One reading of elements: who reads, and for which input of which job.
struct Reading {
  RunContext& run;
  Worker& worker;
  int64_t job;
  int input;

  void read(const Region& region, int64_t first, int64_t count, void* to) const {
    read_elements(run, worker, job, input, region, first, count, to);
  }
  void convert_to(DType from, DType to, const void* source, void* target, int64_t count) const {
    if (from == to)
      memcpy(target, source, size_t(count) * itemsize(from));
    else
      convert(run.settings.isa, from, to, source, target, count);
  }
};

template <class Work>
constexpr DType kWorkType = sizeof(Work) == 8 ? DType::f64 : DType::f32;

bool in_double(const Region& region, const Rows& rows) {
  auto wide = [](const Region& r) { return r.dtype == DType::f64; };
  return wide(region) || std::any_of(rows.source.begin(), rows.source.end(), wide);
}

// body(run, first, count) for the part of each run that lies within the elements [first, first + count).
template <class F>
void each_run(const Rows& rows, int64_t width, int64_t first, int64_t count, F&& body) {
  const int64_t end = first + count;
  auto run = std::upper_bound(rows.run.begin(), rows.run.end(), first / width,
                              [](int64_t row, const RowRun& r) { return row < r.row; });
  for (--run; first < end; ++run) {
    const int64_t stop = run + 1 == rows.run.end() ? end : std::min(end, (run + 1)->row * width);
    body(*run, first, stop - first);
    first = stop;
  }
}

// Elements of a source that stand for those of a run, given the first of the latter.
int64_t place_in(const RowTerm& term, const RowRun& run, int64_t width, int64_t first) {
  return first + (term.row - run.row) * width;
}

template <class Work>
void read_mean(const Reading& reading, const Region& region, const Rows& rows, int64_t width,
               const RowRun& run, int64_t first, int64_t count, void* to) {
  Work* sum = reading.worker.sum.reserve_for<Work>(size_t(count));
  Work* addend = reading.worker.addend.reserve_for<Work>(size_t(count));
  for (int64_t t = 0; t < run.terms; ++t) {
    const RowTerm& term = rows.term[size_t(run.first_term + t)];
    const Region& source = rows.source[size_t(term.source)];
    void* stored = reading.worker.term.reserve(size_t(count * source.item));
    reading.read(source, place_in(term, run, width, first), count, stored);
    reading.convert_to(source.dtype, kWorkType<Work>, stored, t ? addend : sum, count);
    for (int64_t i = 0; t && i < count; ++i) sum[i] += addend[i];
  }
  for (int64_t i = 0; run.terms > 1 && i < count; ++i) sum[i] /= Work(run.terms);
  reading.convert_to(kWorkType<Work>, region.dtype, sum, to, count);
}

// The mean of the first rows, summed in float64 from the first row to the last.
template <class Work>
void prepare_mean(const Reading& reading, const Region& region, const Rows& rows, int64_t width,
                  std::vector<char>* mean) {
  const int64_t step = std::max<int64_t>(1, kStep / width);
  std::vector<char> stored(size_t(step * width * region.item));
  std::vector<double> some(size_t(step * width)), sum(static_cast<size_t>(width));
  for (int64_t row = 0; row < rows.averaged; row += step) {
    reading.run.check_cancelled();
    const int64_t count = std::min(step, rows.averaged - row);
    reading.read(region, row * width, count * width, stored.data());
    reading.convert_to(region.dtype, DType::f64, stored.data(), some.data(), count * width);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j) sum[size_t(j)] += some[size_t(i * width + j)];
  }
  std::vector<Work> rounded(static_cast<size_t>(width));
  for (int64_t j = 0; j < width; ++j) rounded[size_t(j)] = Work(sum[size_t(j)] / double(rows.averaged));
  mean->resize(size_t(width * region.item));
  reading.convert_to(kWorkType<Work>, region.dtype, rounded.data(), mean->data(), width);
}

template <class Work>
void read_rows(const Reading& reading, const Region& region, Compound& compound, const Rows& rows,
               int64_t first, int64_t count, void* to) {
  const int64_t width = compound.width;
  auto* at = static_cast<char*>(to);
  each_run(rows, width, first, count, [&](const RowRun& run, int64_t begin, int64_t size) {
    const RowTerm* term = run.terms > 0 ? &rows.term[size_t(run.first_term)] : nullptr;
    const Region* source = term ? &rows.source[size_t(term->source)] : nullptr;
    if (run.terms == 0) {
      memset(at, 0, size_t(size * region.item));
    } else if (run.terms == RowRun::kMeanOfAll) {
      Prepared& prepared = *compound.prepared;
      std::call_once(prepared.once,
                     [&] { prepare_mean<Work>(reading, region, rows, width, &prepared.mean); });
      for (int64_t i = begin; i < begin + size; ++i)
        memcpy(at + (i - begin) * region.item, &prepared.mean[size_t(i % width * region.item)],
               size_t(region.item));
    } else if (run.terms == 1 && source->dtype == region.dtype) {
      reading.read(*source, place_in(*term, run, width, begin), size, at);
    } else {
      read_mean<Work>(reading, region, rows, width, run, begin, size, at);
    }
    at += size * region.item;
  });
}

// A factor in the working type, row by row as the product takes it.
template <class Work>
void prepare_factor(const Reading& reading, const Region& region, int64_t height, int64_t width,
                    bool transposed, std::vector<char>* factor) {
  const int64_t count = height * width;
  std::vector<char> stored(size_t(count * region.item));
  reading.read(region, 0, count, stored.data());
  factor->resize(size_t(count) * sizeof(Work));
  auto* to = reinterpret_cast<Work*>(factor->data());
  if (!transposed) return reading.convert_to(region.dtype, kWorkType<Work>, stored.data(), to, count);
  std::vector<Work> given(static_cast<size_t>(count));
  reading.convert_to(region.dtype, kWorkType<Work>, stored.data(), given.data(), count);
  for (int64_t i = 0; i < height; ++i)
    for (int64_t j = 0; j < width; ++j) to[i * width + j] = given[size_t(j * height + i)];
}

// x += scale * (left @ right) for `count` elements of one row; each sum goes up the rank, one rounding a
// step.
template <class Work>
void add_product(const Work* left, const Work* right, int64_t rank, int64_t width, Work scale, Work* x,
                 int64_t count) {
  constexpr int64_t kBlock = 32;  // what the registers of the oldest x86-64 hold
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t size = std::min(kBlock, count - at);
    Work sum[kBlock] = {};
    for (int64_t r = 0; r < rank; ++r) {
      const Work* row = right + r * width + at;
      if (size == kBlock)
        for (int64_t j = 0; j < kBlock; ++j) sum[j] += left[r] * row[j];
      else
        for (int64_t j = 0; j < size; ++j) sum[j] += left[r] * row[j];
    }
    for (int64_t j = 0; j < size; ++j) x[at + j] += scale * sum[j];
  }
}

template <class Work>
void read_product(const Reading& reading, const Region& region, Compound& compound, const Product& product,
                  int64_t first, int64_t count, void* to) {
  const int64_t width = compound.width;
  Prepared& prepared = *compound.prepared;
  std::call_once(prepared.once, [&] {
    const int64_t rank = product.rank;
    prepare_factor<Work>(reading, product.left, product.rows, rank, product.transposed, &prepared.left);
    prepare_factor<Work>(reading, product.right, rank, width, product.transposed, &prepared.right);
  });
  const auto* left = reinterpret_cast<const Work*>(prepared.left.data());
  const auto* right = reinterpret_cast<const Work*>(prepared.right.data());
  void* stored = reading.worker.stored.reserve(size_t(count * product.base.item));
  Work* x = reading.worker.product.reserve_for<Work>(size_t(count));
  reading.read(product.base, first, count, stored);
  reading.convert_to(product.base.dtype, kWorkType<Work>, stored, x, count);
  for (int64_t at = 0; at < count;) {
    const int64_t row = (first + at) / width, column = (first + at) % width;
    const int64_t size = std::min(width - column, count - at);
    add_product(left + row * product.rank, right + column, product.rank, width, Work(product.scale), x + at,
                size);
    at += size;
  }
  reading.convert_to(kWorkType<Work>, region.dtype, x, to, count);
}

}  // namespace

void read_elements(RunContext& run, Worker& worker, int64_t job, int input, const Region& region,
                   int64_t first, int64_t count, void* to) {
  const Reading reading{run, worker, job, input};
  if (region.file == kInMemory) {
    memcpy(to, region.address(first), size_t(count * region.item));
    run.report.bytes_read += count * region.item;
  } else if (region.file != kCompound) {
    read_fully(run, job, input, region, first, count, to);
  } else {
    Compound& compound = run.compounds[size_t(region.start)];
    if (const auto* rows = std::get_if<Rows>(&compound.made)) {
      (in_double(region, *rows) ? read_rows<double> : read_rows<float>)(reading, region, compound, *rows,
                                                                        first, count, to);
    } else {
      const auto& product = std::get<Product>(compound.made);
      (region.dtype == DType::f64 ? read_product<double> : read_product<float>)(reading, region, compound,
                                                                                product, first, count, to);
    }
  }
}

void advise_elements(const RunContext& run, const Region& region, int64_t first, int64_t count, int advice) {
  if (region.file == kInMemory) return;
  if (region.file != kCompound) {
    posix_fadvise(run.files[size_t(region.file)], region.start + first * region.item, count * region.item,
                  advice);
    return;
  }
  const Compound& compound = run.compounds[size_t(region.start)];
  const auto* rows = std::get_if<Rows>(&compound.made);
  if (!rows) return advise_elements(run, std::get<Product>(compound.made).base, first, count, advice);
  each_run(*rows, compound.width, first, count, [&](const RowRun& part, int64_t begin, int64_t size) {
    for (int64_t t = 0; size * region.item >= kLeastAdvice && t < part.terms; ++t) {
      const RowTerm& term = rows->term[size_t(part.first_term + t)];
      advise_elements(run, rows->source[size_t(term.source)], place_in(term, part, compound.width, begin),
                      size, advice);
    }
  });
}

void release(RunContext& run, const Region& region) {
  if (region.file != kCompound) return;
  Compound& compound = run.compounds[size_t(region.start)];
  compound.prepared = std::make_unique<Prepared>();
  if (const auto* rows = std::get_if<Rows>(&compound.made))
    for (const Region& source : rows->source) release(run, source);
}

}  // namespace pm
