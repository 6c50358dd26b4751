// The undecided positions of a one-pass merge, kept as small tensors of their own ("chunks"): for each
// position the raw inputs and where the result belongs. They are mapped again, by the same
// kernel, once the thresholds are known, so no input is ever read a second time for them.
#pragma once
#include <mutex>

#include "tile.h"

namespace pm {

// Rows [begin, end) of a chunk lie in tensor `tensor` of the group, at `origin` + position.
struct Span {
  int32_t tensor;
  int64_t origin, size;  // the tile's first element within the tensor, and its length
  int64_t begin, end;
};

struct Chunk {
  char* slab = nullptr;
  int64_t spilled_at = -1;  // byte offset in the spill file, if the slab was written out
  int64_t size = 0;
  std::vector<Span> spans;
  bool sealed = false;
};

// Columns of a chunk within its slab.
struct ChunkLayout {
  int experts;
  int item;
  int64_t rows;

  ChunkLayout(int experts, int item);
  int64_t slab_bytes() const { return (rows * row_bytes() + 4095) / 4096 * 4096; }
  int64_t row_bytes() const { return int64_t(experts + 1) * item + 4; }
  char* base(char* slab) const { return slab + rows * 4; }
  char* expert(char* slab, int k) const { return base(slab) + (k + 1) * rows * item; }
  uint32_t* position(char* slab) const { return reinterpret_cast<uint32_t*>(slab); }
};

struct Overflow {};  // the undecided do not fit: the caller takes the exact route

class UndecidedStore {
 public:
  UndecidedStore(RunContext& run, int experts, int item);
  ~UndecidedStore();
  UndecidedStore(const UndecidedStore&) = delete;

  const ChunkLayout& layout() const { return layout_; }
  // A chunk with room for at least a block, replacing `full` (may be null), which is sealed.
  Chunk* next(Chunk* full);
  void seal(Chunk* chunk);
  // Appends the rows of `tile` from `first` whose bits are set in `undecided`, a bitmap of kBlock bits; they
  // belong to the chunk's last span.
  void append(Chunk* chunk, const Tile& tile, int64_t first, const uint64_t* undecided) const;
  // How many rows of an open chunk, from `first` on, are undecided for expert k: keys in [low, high).
  template <class Work, class Bits>
  int64_t count_open(const Chunk& chunk, int64_t first, int k, const KernelSet<Work>& kernels, Bits low,
                     Bits high) const {
    const int64_t offset = first * layout_.item;
    return kernels.count_open(layout_.base(chunk.slab) + offset, layout_.expert(chunk.slab, k) + offset,
                              chunk.size - first, low, high);
  }
  const std::vector<std::unique_ptr<Chunk>>& chunks() const { return chunks_; }
  // The chunk's slab; reads it back into the worker's buffer if it was spilled.
  char* open(const Chunk& chunk, Worker& worker) const;
  int64_t rows() const;

  static constexpr int64_t kBlock = 2048;  // rows of a bitmap: no more are appended at once

 private:
  char* allocate() const;
  char* spill(Chunk& chunk);

  RunContext& run_;
  ChunkLayout layout_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  int64_t spilled_bytes_ = 0;
};

}  // namespace pm
