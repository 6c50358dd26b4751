#include "undecided.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace pm {

namespace {

constexpr int64_t kSlack = kMaxGroup;  // packing may write a group past the last row

}  // namespace

ChunkLayout::ChunkLayout(int experts, int item) : experts(experts), item(item), rows(0) {
  rows = std::max(int64_t(SlabPool::kBytes) / row_bytes(), 2 * (UndecidedStore::kBlock + kSlack)) / 64 * 64;
}

UndecidedStore::UndecidedStore(RunContext& run, int experts, int item) : run_(run), layout_(experts, item) {}

UndecidedStore::~UndecidedStore() {
  for (auto& chunk : chunks_)
    if (chunk->slab) run_.slabs.give(chunk->slab, size_t(layout_.slab_bytes()));
}

char* UndecidedStore::allocate() const {
  return run_.slabs.take(size_t(layout_.slab_bytes()), size_t(run_.settings.memory));
}

// Writes a chunk's slab out and returns the slab, free.
char* UndecidedStore::spill(Chunk& chunk) {
  const int64_t bytes = layout_.slab_bytes();
  chunk.spilled_at = run_.spilled.fetch_add(bytes);
  for (int64_t done = 0; done < bytes;) {
    const ssize_t put =
        pwrite(run_.settings.spill, chunk.slab + done, size_t(bytes - done), chunk.spilled_at + done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0)
      throw StreamError(-1, StreamError::kOutput, std::string("cannot be written: ") + strerror(errno));
    done += put;
  }
  return std::exchange(chunk.slab, nullptr);
}

Chunk* UndecidedStore::next(Chunk* full) {
  std::lock_guard lock(mutex_);
  if (full) full->sealed = true;
  char* slab = allocate();
  if (!slab && run_.settings.spill >= 0) {
    const auto sealed =
        std::find_if(chunks_.begin(), chunks_.end(), [](auto& c) { return c->sealed && c->slab; });
    if (sealed != chunks_.end()) slab = spill(**sealed);
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
    const ssize_t got =
        pread(run_.settings.spill, slab + done, size_t(bytes - done), chunk.spilled_at + done);
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
