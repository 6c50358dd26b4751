// CUDA on the processor, for tests: blocks run one after another, and every thread of a block is a fiber that
// runs until it meets a barrier. The order of threads and blocks is shuffled by a seed, so that what depends
// on it shows. Not modelled: weak memory, blocks that wait for each other.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x, y, z;
  explicit dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

namespace fiber {

struct Stream {
  uint64_t seed = 0;  // 0: in order
};

constexpr unsigned int kWarp = 32;
constexpr size_t kStack = 256 << 10;

// A barrier lets everybody go when all that it expects have arrived.
struct Barrier {
  unsigned int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;
  bool done = false;
  bool ready() const { return !done && !(waits_for && waits_for->generation == generation); }
};

struct Warp {
  Barrier barrier;
  uint64_t slot[kWarp];
};

// The one block that runs at the moment.
struct Machine {
  dim3 block, grid, size, thread;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier all;
  size_t current = 0;
  ucontext_t scheduler;
  std::function<void()> body;
  bool refuses = false;        // as a device does that has no machine code for a kernel
  bool skip_barriers = false;  // plants the bug of a missing __syncthreads, to show that tests find it
};
inline Machine machine;

inline void require() {
  if (machine.refuses) throw std::runtime_error("no kernel image is available");
}

inline void stop(const char* what) {
  std::fprintf(stderr, "fiber: %s in block %u of thread %zu\n", what, machine.block.x, machine.current);
  std::abort();
}

inline void wait_at(Barrier& barrier) {
  Thread& me = machine.threads[machine.current];
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  me.waits_for = &barrier, me.generation = barrier.generation;
  swapcontext(&me.context, &machine.scheduler);
  me.waits_for = nullptr;
}

inline void leave(Barrier& barrier) {  // a thread that has returned no longer counts
  if (--barrier.expected == barrier.arrived && barrier.arrived) barrier.arrived = 0, ++barrier.generation;
}

inline void enter_thread() {
  machine.body();
  machine.threads[machine.current].done = true;
  leave(machine.all);
  leave(machine.warps[machine.current / kWarp].barrier);
  swapcontext(&machine.threads[machine.current].context, &machine.scheduler);
}

inline void start_block(dim3 block, int count) {
  machine.block = block;
  machine.all = {unsigned(count), 0, 0};
  machine.warps.assign((size_t(count) + kWarp - 1) / kWarp, Warp{});
  for (int t = 0; t < count; ++t) {
    Thread& thread = machine.threads[size_t(t)];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    thread.done = false, thread.waits_for = nullptr;
    makecontext(&thread.context, enter_thread, 0);
    ++machine.warps[size_t(t) / kWarp].barrier.expected;
  }
}

inline void finish_block(std::vector<size_t>& order, std::mt19937_64* shuffler) {
  for (bool moved = true, left = true; left;) {
    if (!moved) stop("threads wait at different barriers");
    moved = left = false;
    if (shuffler) std::shuffle(order.begin(), order.end(), *shuffler);
    for (size_t t : order) {
      left |= !machine.threads[t].done;
      if (!machine.threads[t].ready()) continue;
      moved = true;
      machine.current = t;
      machine.thread = dim3(unsigned(t));
      swapcontext(&machine.scheduler, &machine.threads[t].context);
    }
  }
}

template <class F>
void run(Stream stream, dim3 grid, int count, F&& body) {
  machine.body = body;
  machine.grid = grid;
  machine.size = dim3(unsigned(count));
  if (machine.threads.size() < size_t(count)) machine.threads.resize(size_t(count));
  std::mt19937_64 shuffler(stream.seed);
  std::vector<unsigned int> blocks(size_t(grid.x) * grid.y);
  std::vector<size_t> order(static_cast<size_t>(count));
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::iota(order.begin(), order.end(), size_t(0));
  if (stream.seed) std::shuffle(blocks.begin(), blocks.end(), shuffler);
  for (unsigned int b : blocks) {
    start_block(dim3(b % grid.x, b / grid.x), count);
    finish_block(order, stream.seed ? &shuffler : nullptr);
  }
}

// All lanes of a warp show each other a value; returns what lane `from` shows.
inline uint64_t* exchange(unsigned int mask, uint64_t value) {
  Warp& warp = machine.warps[machine.current / kWarp];
  if (mask != ~0u || warp.barrier.expected != kWarp) stop("part of a warp exchanges values");
  warp.slot[machine.current % kWarp] = value;
  wait_at(warp.barrier);
  return warp.slot;
}
inline void end_exchange() { wait_at(machine.warps[machine.current / kWarp].barrier); }

template <class T>
T show(unsigned int mask, T value, unsigned int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  T seen;
  std::memcpy(&seen, &exchange(mask, bits)[from % kWarp], sizeof seen);
  end_exchange();
  return seen;
}

}  // namespace fiber

#define threadIdx (fiber::machine.thread)
#define blockIdx (fiber::machine.block)
#define blockDim (fiber::machine.size)
#define gridDim (fiber::machine.grid)

inline void __syncthreads() {
  if (!fiber::machine.skip_barriers) fiber::wait_at(fiber::machine.all);
}
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned int mask, T value, int lane) {
  return fiber::show(mask, value, unsigned(lane));
}
template <class T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int step) {
  const auto lane = unsigned(fiber::machine.current % fiber::kWarp);
  return fiber::show(mask, value, lane >= step ? lane - step : lane);
}
inline unsigned int __reduce_add_sync(unsigned int mask, unsigned int value) {
  const uint64_t* all = fiber::exchange(mask, value);
  const auto sum = unsigned(std::accumulate(all, all + fiber::kWarp, uint64_t(0)));
  fiber::end_exchange();
  return sum;
}
inline unsigned int __reduce_or_sync(unsigned int mask, unsigned int value) {
  const uint64_t* all = fiber::exchange(mask, value);
  const auto bits = unsigned(std::accumulate(all, all + fiber::kWarp, uint64_t(0), std::bit_or<>()));
  fiber::end_exchange();
  return bits;
}
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
