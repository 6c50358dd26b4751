#include "tile.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

namespace pm {

namespace {

constexpr int64_t kLargeOutput = 1 << 20;  // bytes past which a result would only evict the inputs

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

void* Buffer::reserve(size_t bytes) {
  if (bytes > bytes_ || !memory_) {
    memory_.reset();
    bytes_ = round_up(bytes + 1, 4096);
    memory_.reset(aligned_alloc(4096, bytes_));
    if (!memory_) throw std::bad_alloc();
  }
  return memory_.get();
}

SlabPool::~SlabPool() {
  for (auto& [bytes, slab] : free_) free(slab);
}

char* SlabPool::take(size_t bytes, size_t limit) {
  std::lock_guard lock(mutex_);
  const auto fitting =
      std::find_if(free_.begin(), free_.end(), [bytes](auto& slab) { return slab.first == bytes; });
  if (fitting != free_.end()) {
    char* slab = fitting->second;
    free_.erase(fitting);
    return slab;
  }
  while (total_ + bytes > limit && !free_.empty()) {  // of another size: no use to anyone at the moment
    total_ -= free_.back().first;
    free(free_.back().second);
    free_.pop_back();
  }
  if (total_ + bytes > limit) return nullptr;
  char* slab = static_cast<char*>(aligned_alloc(4096, bytes));
  if (!slab) throw std::bad_alloc();
  total_ += bytes;
  return slab;
}

void SlabPool::give(char* slab, size_t bytes) {
  std::lock_guard lock(mutex_);
  free_.emplace_back(bytes, slab);
}

void read_fully(RunContext& run, int64_t job, int input, const Region& region, int64_t first, int64_t count,
                void* to) {
  int64_t offset = region.start + first * region.item, left = count * region.item;
  auto* at = static_cast<char*>(to);
  while (left > 0) {
    const ssize_t got = pread(run.files[size_t(region.file)], at, size_t(left), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw StreamError(job, input, std::string("cannot be read: ") + strerror(errno), region.file);
    if (got == 0)
      throw StreamError(job, input,
                        "ends at byte " + std::to_string(offset) + ", " + std::to_string(left) +
                            " bytes short of what its header promised",
                        region.file);
    at += got, offset += got, left -= got;
  }
  if (input != StreamError::kOutput) run.report.bytes_read += count * region.item;
}

void write_fully(RunContext& run, int64_t job, const Region& region, int64_t first, int64_t count,
                 const void* from) {
  int64_t offset = region.start + first * region.item, left = count * region.item;
  auto* at = static_cast<const char*>(from);
  while (left > 0) {
    const ssize_t put = pwrite(run.files[size_t(region.file)], at, size_t(left), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0)
      throw StreamError(job, StreamError::kOutput, std::string("cannot be written: ") + strerror(errno));
    at += put, offset += put, left -= put;
  }
}

DType JobView::natural_kernel(const TensorJob& job) {
  bool one_type = !job.has_cast || job.cast == job.out.dtype, any_double = false;
  for (int i = 0; i < job.inputs; ++i) {
    one_type &= job.input[i].dtype == job.out.dtype;
    any_double |= (job.has_cast ? job.cast : job.input[i].dtype) == DType::f64;
  }
  return any_double ? DType::f64 : one_type ? job.out.dtype : DType::f32;
}

JobView::JobView(RunContext& run, const TensorJob& job, int64_t number, DType kernel)
    : run_(run), job_(&job), number_(number), kernel_(kernel) {
  has_base_ = run.rules[size_t(job_->rule)].base ? 1 : 0;
  direct_ = kernel == job_->out.dtype && (!job_->has_cast || job_->cast == kernel);
  for (int i = 0; i < job_->inputs; ++i) direct_ &= job_->input[i].dtype == kernel;
}

const void* JobView::load_input(Worker& worker, int input, int64_t first, int64_t count) const {
  const Region& region = job_->input[input];
  const size_t slots = size_t(job_->inputs), items = round_up(size_t(count), 64) + 64;
  const void* source;
  if (region.file == kInMemory) {
    source = region.address(first);
    run_.report.bytes_read += count * region.item;
  } else {
    void* to = static_cast<char*>(worker.raw.reserve(slots * items * 8)) + size_t(input) * items * 8;
    read_elements(run_, worker, number_, input, region, first, count, to);
    source = to;
  }
  if (direct_) return source;
  DType from = region.dtype;
  if (job_->has_cast && job_->cast != from) {
    void* to = worker.cast.reserve(items * 8);
    convert(run_.settings.isa, from, job_->cast, source, to, count);
    source = to, from = job_->cast;
  }
  void* to = static_cast<char*>(worker.wide.reserve(slots * items * 8)) + size_t(input) * items * 8;
  if (from == kernel_)
    memcpy(to, source, size_t(count) * itemsize(from));
  else
    convert(run_.settings.isa, from, kernel_, source, to, count);
  return to;
}

void JobView::load(Worker& worker, int64_t first, int64_t count) const {
  run_.check_cancelled();
  Tile& tile = worker.tile;
  tile.expert.resize(size_t(expert_count()));
  tile.base = has_base_ ? load_input(worker, 0, first, count) : nullptr;
  for (int k = 0; k < expert_count(); ++k)
    tile.expert[size_t(k)] = load_input(worker, k + has_base_, first, count);
}

void* JobView::output_address(int64_t element) const {
  if (held_) return static_cast<char*>(held_) + element * job_->out.item;
  return job_->out.file == kInMemory ? job_->out.address(element) : nullptr;
}

void* JobView::result(Buffer& buffer, int64_t first, int64_t count) const {
  void* address = output_address(first);
  return direct_ && address ? address : buffer.reserve(size_t(count) * size_t(kernel_item()) + 64);
}

bool JobView::bypass_cache(const void* result, int64_t count) const {
  return direct_ && !held_ && job_->out.file == kInMemory && count * job_->out.item >= kLargeOutput &&
         reinterpret_cast<uintptr_t>(result) % 64 == 0;
}

void JobView::store(Worker& worker, int64_t first, int64_t count, const void* result) const {
  void* address = output_address(first);
  if (direct_ && address == result) return publish_stores();
  const void* source = result;
  if (!direct_) {
    void* to = address ? address : worker.narrowed.reserve(size_t(count) * size_t(job_->out.item));
    if (kernel_ == job_->out.dtype)
      memcpy(to, result, size_t(count) * size_t(kernel_item()));
    else
      convert(run_.settings.isa, kernel_, job_->out.dtype, result, to, count);
    source = to;
  }
  if (!address) write_fully(run_, number_, job_->out, first, count, source);
}

void JobView::flush() const {
  if (!held_ || job_->out.file == kInMemory) return;
  write_fully(run_, number_, job_->out, 0, job_->count, held_);
}

void JobView::patch(Worker& worker, int64_t origin, int64_t span, const uint32_t* position, const void* value,
                    int64_t count) const {
  const size_t item = size_t(job_->out.item);
  const void* source = value;
  if (!direct_ && kernel_ != job_->out.dtype) {
    void* to = worker.cast.reserve(size_t(count) * item);
    convert(run_.settings.isa, kernel_, job_->out.dtype, value, to, count);
    source = to;
  }
  auto* target = static_cast<char*>(output_address(origin));
  const bool in_file = !target;
  if (in_file) {  // the tile was written moments ago: read it back, change it, write it once
    target = static_cast<char*>(worker.narrowed.reserve(size_t(span) * item));
    read_fully(run_, number_, StreamError::kOutput, job_->out, origin, span, target);
  }
  auto scatter = [&]<class T>(T) {
    for (int64_t i = 0; i < count; ++i)
      static_cast<T*>(static_cast<void*>(target))[position[i]] = static_cast<const T*>(source)[i];
  };
  item == 2 ? scatter(uint16_t{}) : item == 4 ? scatter(uint32_t{}) : scatter(uint64_t{});
  if (in_file) write_fully(run_, number_, job_->out, origin, span, target);
}

void JobView::advise(int64_t first, int64_t count, int advice) const {
  for (int i = 0; i < job_->inputs; ++i) advise_elements(run_, job_->input[i], first, count, advice);
}

void JobView::will_need(int64_t first, int64_t count) const { advise(first, count, POSIX_FADV_WILLNEED); }

void JobView::drop_behind() const { advise(0, job_->count, POSIX_FADV_DONTNEED); }

}  // namespace pm
