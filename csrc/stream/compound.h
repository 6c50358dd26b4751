// Inputs that no file holds as they are: rows from several places, or a product added to a tensor.
#pragma once
#include <memory>
#include <mutex>
#include <variant>

#include "job.h"

namespace pm {

struct RunContext;
struct Worker;

// A row of one of the sources.
struct RowTerm {
  int64_t source, row;
};

// Rows from `row` on, up to the next run: the mean of as many rows of each term; without terms, zeros.
struct RowRun {
  static constexpr int64_t kMeanOfAll = -1;  // as `terms`: every row is the mean of the first `averaged` rows
  int64_t row, terms, first_term;
};

struct Rows {
  std::vector<Region> source;
  std::vector<RowRun> run;
  std::vector<RowTerm> term;
  int64_t averaged = 0;
};

// base + scale * (left @ right), where left has `rank` columns; transposed: the files hold left and right so.
struct Product {
  Region base, left, right;
  int64_t rows = 0, rank = 0;
  double scale = 1;
  bool transposed = false;
};

// What the first reader of a compound prepares for all others, until the tensor is done.
struct Prepared {
  std::once_flag once;
  std::vector<char> left, right, mean;
};

struct Compound {
  int64_t width = 0;  // elements of a row
  std::variant<Rows, Product> made;
  std::unique_ptr<Prepared> prepared = std::make_unique<Prepared>();
};

// Brings `count` elements of any region to `to`.
void read_elements(RunContext& run, Worker& worker, int64_t job, int input, const Region& region,
                   int64_t first, int64_t count, void* to);

// Passes `advice` on the bytes of these elements to the system.
void advise_elements(const RunContext& run, const Region& region, int64_t first, int64_t count, int advice);

// Frees what reading the region has prepared.
void release(RunContext& run, const Region& region);

}  // namespace pm
