// A worker and its tile: inputs come in, in the form the kernels take, and the result goes out.
#pragma once
#include <memory>
#include <mutex>

#include "../cpu/select.h"
#include "compound.h"
#include "job.h"

namespace pm {

// Page-aligned memory that grows and is reused; contents do not survive growth.
class Buffer {
 public:
  void* reserve(size_t bytes);
  template <class T>
  T* reserve_for(size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(void* p) const { free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// Inputs of one tile as kernels read them.
struct Tile {
  const void* base = nullptr;
  std::vector<const void*> expert;
};

struct Worker {
  Buffer raw, wide, cast, result, narrowed, scratch, chunk, held;
  Buffer words, keys, bitmaps, scores;        // of masks
  Buffer term, addend, sum, stored, product;  // of compounds
  Tile tile;
  std::vector<const void*> block_expert;  // the tile's experts, moved on to a block within it
  std::vector<const uint64_t*> mask;      // the bitmap of each expert
  std::vector<Buffer> further;            // results that differ in lambda alone
};

// Slabs for undecided positions, reused from tensor to tensor: touching fresh memory costs more than the
// rest.
class SlabPool {
 public:
  static constexpr size_t kBytes = 1 << 20;
  ~SlabPool();
  // A slab of at least `bytes`, or null once all slabs together would exceed `limit`.
  char* take(size_t bytes, size_t limit);
  void give(char* slab, size_t bytes);

 private:
  std::mutex mutex_;
  std::vector<std::pair<size_t, char*>> free_;
  size_t total_ = 0;
};

// One run's files, jobs and counters, shared by all its workers.
struct RunContext {
  Settings settings;
  std::vector<int> files;
  std::vector<TensorJob> jobs;
  std::vector<Rule> rules;
  std::vector<Compound> compounds;
  std::vector<Worker> workers;
  SlabPool slabs;
  std::atomic<int64_t> spilled{0};  // bytes of the spill file in use
  std::vector<std::vector<Cut>>
      cuts;  // per group: the thresholds, one per expert; given, or empty until found
  std::vector<std::atomic<bool>> finished;  // per job: its output is final
  std::vector<std::atomic<int64_t>> nan;    // per variant: elements of its results that are NaN
  Report report;

  void check_cancelled() const {
    if (report.cancelled.load(std::memory_order_relaxed)) throw Cancelled{};
  }
};

// How one job's elements reach the kernels.
class JobView {
 public:
  // `job` is number `number` of the run's, or a part of it; it must stay where it is.
  JobView(RunContext& run, const TensorJob& job, int64_t number, DType kernel);
  // The type the job's kernels would best run in: the stored one if nothing is converted, else f32 or f64.
  static DType natural_kernel(const TensorJob& job);

  const TensorJob& job() const { return *job_; }
  int64_t number() const { return number_; }
  DType kernel_dtype() const { return kernel_; }
  int kernel_item() const { return itemsize(kernel_); }
  int expert_count() const { return job_->inputs - has_base_; }
  // Elements of a row; a tensor without rows is one.
  int64_t row() const { return job_->row > 0 ? job_->row : job_->count; }
  const void* shifted(const void* p, int64_t elements) const {
    return static_cast<const char*>(p) + elements * kernel_item();
  }

  // Makes elements [first, first + count) of every input available in `worker.tile`.
  void load(Worker& worker, int64_t first, int64_t count) const;

  // Where the kernel shall write `count` results from `first`, in the output itself or in `buffer`; pass them
  // to `store` afterwards.
  void* result(Buffer& buffer, int64_t first, int64_t count) const;
  void store(Worker& worker, int64_t first, int64_t count, const void* result) const;
  bool bypass_cache(const void* result, int64_t count) const;

  // From now on results are gathered in memory of the job's size; flush writes them out in one go.
  void hold(void* memory) { held_ = memory; }
  void flush() const;

  // Replaces single elements of the output, in ascending order of position.
  void patch(Worker& worker, int64_t origin, int64_t span, const uint32_t* position, const void* value,
             int64_t count) const;

  // Tells the system which inputs are read soon; drop_behind gives back all of them.
  void will_need(int64_t first, int64_t count) const;
  void drop_behind() const;

 private:
  void advise(int64_t first, int64_t count, int advice) const;
  const void* load_input(Worker& worker, int input, int64_t first, int64_t count) const;
  void* output_address(int64_t element) const;

  RunContext& run_;
  const TensorJob* job_;
  int64_t number_;
  DType kernel_;
  bool direct_;  // stored, computed and written in one type: no conversion
  int has_base_;
  void* held_ = nullptr;
};

void read_fully(RunContext& run, int64_t job, int input, const Region& region, int64_t first, int64_t count,
                void* to);
void write_fully(RunContext& run, int64_t job, const Region& region, int64_t first, int64_t count,
                 const void* from);

}  // namespace pm
