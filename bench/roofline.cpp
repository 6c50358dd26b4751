// What this machine's memory can do for a merge: read `streams` arrays, write one, and compute next to
// nothing.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;

void pass(const std::vector<char*>& in, char* out, size_t begin, size_t end) {
  for (size_t at = begin; at < end; at += kLine) {
#if defined(__AVX512F__)
    __m512i sum = _mm512_load_si512(in[0] + at);
    for (size_t s = 1; s < in.size(); ++s) sum = _mm512_xor_si512(sum, _mm512_load_si512(in[s] + at));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at), sum);
#elif defined(__AVX2__)
    for (size_t j = 0; j < kLine; j += 32) {
      auto load = [&](char* p) { return _mm256_load_si256(reinterpret_cast<__m256i*>(p + at + j)); };
      __m256i sum = load(in[0]);
      for (size_t s = 1; s < in.size(); ++s) sum = _mm256_xor_si256(sum, load(in[s]));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + j), sum);
    }
#else
    for (size_t j = 0; j < kLine; j += 8) {
      uint64_t sum = 0;
      for (char* p : in) sum ^= *reinterpret_cast<uint64_t*>(p + at + j);
      *reinterpret_cast<uint64_t*>(out + at + j) = sum;
    }
#endif
  }
}

}  // namespace

// roofline STREAMS BYTES THREADS RUNS: prints seconds, one run per line.
int main(int, char** argv) {
  const size_t streams = strtoull(argv[1], nullptr, 10), bytes = strtoull(argv[2], nullptr, 10) / 4096 * 4096;
  const int threads = atoi(argv[3]), runs = atoi(argv[4]);
  std::vector<char*> in;
  for (size_t s = 0; s <= streams; ++s) in.push_back(static_cast<char*>(aligned_alloc(4096, bytes)));
  char* out = in.back();
  in.pop_back();
  auto share = [&](int t) { return bytes / kLine * size_t(t) / size_t(threads) * kLine; };
  auto together = [&](auto&& body) {
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { body(share(t), share(t + 1)); });
    for (auto& thread : team) thread.join();
  };
  together([&](size_t begin, size_t end) {
    for (char* p : in)
      for (size_t at = begin; at < end; ++at) p[at] = char(at * 7);
    for (size_t at = begin; at < end; ++at) out[at] = 1;
  });
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    together([&](size_t begin, size_t end) { pass(in, out, begin, end); });
    printf("%.6f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    fflush(stdout);
    if (run + 1 < runs && getchar() == EOF) break;  // the caller says when, so that tools take turns
  }
}
