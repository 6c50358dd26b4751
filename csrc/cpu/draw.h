// Random words and what is made of them: one bit per element.
#pragma once
#include "../core/lane.h"

namespace pm {

struct DrawKernels {
  // words[i] for element `index` + i of an expert, `count` rounded up to whole groups; index: a multiple
  // of 4.
  void (*words)(uint64_t index, int64_t count, int expert, uint64_t key, uint32_t* words);
  // One bit for each word below `limit`; bits past `count` are anything.
  void (*below)(const uint32_t* words, int64_t count, uint32_t limit, uint64_t* bits);
};

constexpr int64_t kDrawRoom = 64;  // elements past `count` that `words` may write

template <class V>
struct DrawKernel {
  static constexpr int kElements = V::width * kGroup;
  static_assert(64 % kElements == 0 && kElements <= kDrawRoom);

  static void words(uint64_t index, int64_t count, int expert, uint64_t key, uint32_t* words) {
    const auto keys = random_keys(key, V{});
    for (int64_t at = 0; at < count; at += kElements)
      random_words(index + uint64_t(at), uint32_t(expert), keys, V{}, words + at);
  }

  static void below(const uint32_t* words, int64_t count, uint32_t limit, uint64_t* bits) {
    for (int64_t at = 0; at < count; at += 64) {
      uint64_t word = 0;
      for (int part = 0; part < 64 && at + part < count; part += kElements)
        word |= words_below(words + at + part, limit, V{}) << part;
      bits[at / 64] = word;
    }
  }
};

}  // namespace pm
