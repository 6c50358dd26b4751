#include "undecided.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace pm {

namespace {

constexpr int64_t kSlabBytes = 1 << 20;
constexpr int64_t kSlack = kMaxGroup;  // packing may write a group past the last row

}  // namespace

ChunkLayout::ChunkLayout(int experts, int item) : experts(experts), item(item), rows(0) {
  rows = std::max(kSlabBytes / row_bytes(), 2 * (UndecidedStore::kBlock + kSlack)) / 64 * 64;
}

UndecidedStore::UndecidedStore(RunContext& run, int experts, int item)
    : run_(run), layout_(experts, item), slab_limit_(run.settings.memory / layout_.slab_bytes()) {}

UndecidedStore::~UndecidedStore() {
  for (char* slab : slabs_) free(slab);
}

char* UndecidedStore::allocate() {
  if (!free_.empty()) {
    char* slab = free_.back();
    free_.pop_back();
    return slab;
  }
  if (int64_t(slabs_.size()) >= slab_limit_) return nullptr;
  auto* slab = static_cast<char*>(aligned_alloc(4096, size_t(layout_.slab_bytes() + 4095) / 4096 * 4096));
  if (!slab) throw std::bad_alloc();
  slabs_.push_back(slab);
  return slab;
}

void UndecidedStore::spill(Chunk& chunk) {
  const int64_t bytes = layout_.slab_bytes();
  chunk.spilled_at = spilled_bytes_;
  for (int64_t done = 0; done < bytes;) {
    const ssize_t put = pwrite(run_.settings.spill, chunk.slab + done, size_t(bytes - done), spilled_bytes_ + done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) throw StreamError(-1, StreamError::kOutput, std::string("cannot be written: ") + strerror(errno));
    done += put;
  }
  spilled_bytes_ += bytes;
  free_.push_back(chunk.slab);
  chunk.slab = nullptr;
}

Chunk* UndecidedStore::next(Chunk* full) {
  std::lock_guard lock(mutex_);
  if (full) full->sealed = true;
  char* slab = allocate();
  if (!slab && run_.settings.spill >= 0) {
    for (auto& chunk : chunks_)
      if (chunk->sealed && chunk->slab && chunk.get() != full) {
        spill(*chunk);
        break;
      }
    if (free_.empty() && full) spill(*full);
    slab = free_.empty() ? nullptr : allocate();
  }
  if (!slab) throw Overflow{};
  chunks_.push_back(std::make_unique<Chunk>());
  chunks_.back()->slab = slab;
  return chunks_.back().get();
}

void UndecidedStore::seal(Chunk* chunk) {
  std::lock_guard lock(mutex_);
  chunk->sealed = true;
}

char* UndecidedStore::open(const Chunk& chunk, Worker& worker) const {
  if (chunk.slab) return chunk.slab;
  const int64_t bytes = layout_.slab_bytes();
  char* slab = static_cast<char*>(worker.chunk.reserve(size_t(bytes)));
  for (int64_t done = 0; done < bytes;) {
    const ssize_t got = pread(run_.settings.spill, slab + done, size_t(bytes - done), chunk.spilled_at + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw StreamError(-1, StreamError::kOutput, "the spill file cannot be read back");
    done += got;
  }
  return slab;
}

int64_t UndecidedStore::rows() const {
  int64_t rows = 0;
  for (const auto& chunk : chunks_) rows += chunk->size;
  return rows;
}

}  // namespace pm
