#include "undecided.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace pm {

ChunkLayout::ChunkLayout(int experts, int item) : experts(experts), item(item), rows(0) {
  rows = std::max(int64_t(SlabPool::kBytes) / row_bytes(), 2 * UndecidedStore::kBlock) / 64 * 64;
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

void UndecidedStore::append(Chunk* chunk, const Tile& tile, int64_t first, const uint64_t* undecided) const {
  uint32_t* const position = layout_.position(chunk->slab) + chunk->size;
  int64_t count = 0;
  for (int64_t word = 0; word < kBlock / 64; ++word)
    for (uint64_t bits = undecided[word]; bits; bits &= bits - 1)
      position[count++] = uint32_t(first + 64 * word + __builtin_ctzll(bits));
  if (!count) return;
  auto gather =
      [&]<class Raw>(Raw) {  // column by column: one stream out, and the block is still in the cache
        auto column = [&](const void* from, char* to) {
          for (int64_t i = 0; i < count; ++i)
            reinterpret_cast<Raw*>(to)[chunk->size + i] = static_cast<const Raw*>(from)[position[i]];
        };
        column(tile.base, layout_.base(chunk->slab));
        for (int k = 0; k < layout_.experts; ++k)
          column(tile.expert[size_t(k)], layout_.expert(chunk->slab, k));
      };
  layout_.item == 2 ? gather(uint16_t{}) : layout_.item == 4 ? gather(uint32_t{}) : gather(uint64_t{});
  chunk->size = chunk->spans.back().end = chunk->size + count;
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
