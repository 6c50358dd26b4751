#include "engine.h"

#include <algorithm>
#include <cstring>

namespace pm {

namespace {

constexpr int64_t kHeldBytes = 16 << 20;  // results up to this size stay in memory until they are final

int64_t elements_of(const RunContext& run, const std::vector<int64_t>& group) {
  int64_t sum = 0;
  for (int64_t job : group) sum += run.jobs[size_t(job)].count;
  return sum;
}

// Integers and booleans: every input must hold the same bytes, and those are the result.
void copy_equal(RunContext& run, int64_t number, Crew& crew) {
  const TensorJob& job = run.jobs[size_t(number)];
  const int64_t tile = run.settings.tile;
  crew.each((job.count + tile - 1) / tile, [&](int member, int64_t piece) {
    run.check_cancelled();
    Worker& worker = run.workers[size_t(member)];
    const int64_t first = piece * tile, count = std::min(tile, job.count - first);
    const size_t bytes = size_t(count * job.out.item);
    auto fetch = [&](int input, Buffer& buffer) -> const void* {
      const Region& region = job.input[input];
      if (region.file == kInMemory) return region.address(first);
      void* to = buffer.reserve(bytes);
      read_elements(run, worker, number, input, region, first, count, to);
      return to;
    };
    const void* expected = fetch(0, worker.raw);
    for (int i = 1; i < job.inputs; ++i) {
      const auto *a = static_cast<const char*>(expected),
                 *b = static_cast<const char*>(fetch(i, worker.wide));
      if (memcmp(a, b, bytes) == 0) continue;
      const int64_t at = std::mismatch(a, a + bytes, b).first - a;
      throw StreamError(number, i,
                        "differs from the first input at element " +
                            std::to_string(first + at / job.out.item) +
                            ", but tensors of integers must be equal in all inputs");
    }
    if (job.out.file == kInMemory)
      memcpy(job.out.address(first), expected, bytes);
    else
      write_fully(run, number, job.out, first, count, expected);
  });
}

template <class Work>
void merge_jobs(RunContext& run, int64_t number, const std::vector<int64_t>& jobs, Crew& crew, Buffer* held) {
  Group<Work> group(run, number, jobs);
  const TensorJob& first = group.views[0].job();
  if (held && jobs.size() == 1 && by_magnitude(group.rule().trim) && first.out.file != kInMemory)
    group.views[0].hold(held->reserve(size_t(first.count) * size_t(first.out.item)));
  const Rule& rule = group.rule();
  if (rule.blend.kind != Blend::none)
    blend_group(group, crew);
  else if (by_mask(rule.trim) || rule.fuse != Fuse::none)
    masked_group(group, crew);
  else
    merge_group(group, crew);
  for (const auto& view : group.views) {
    view.flush();
    if (run.settings.drop_behind) view.drop_behind();
  }
}

void merge_or_copy(RunContext& run, int64_t number, std::vector<int64_t> jobs, Crew& crew, Buffer* held) {
  std::erase_if(jobs, [&](int64_t job) { return run.jobs[size_t(job)].count == 0; });
  if (jobs.empty()) return;
  for (int64_t job : jobs) {
    run.report.elements += run.jobs[size_t(job)].count;
    run.report.bytes_written += run.jobs[size_t(job)].count * run.jobs[size_t(job)].out.item;
  }
  if (run.jobs[size_t(jobs[0])].rule < 0) return copy_equal(run, jobs[0], crew);
  const bool in_double = std::any_of(jobs.begin(), jobs.end(), [&](int64_t job) {
    return JobView::natural_kernel(run.jobs[size_t(job)]) == DType::f64;
  });
  in_double ? merge_jobs<double>(run, number, jobs, crew, held)
            : merge_jobs<float>(run, number, jobs, crew, held);
}

void run_group(RunContext& run, int64_t number, const std::vector<int64_t>& jobs, Crew& crew, Buffer* held) {
  merge_or_copy(run, number, jobs, crew, held);
  for (int64_t number : jobs) {
    const TensorJob& job = run.jobs[size_t(number)];
    for (int i = 0; i < job.inputs; ++i) release(run, job.input[i]);
    run.finished[size_t(number)] = true;
  }
}

}  // namespace

void run_jobs(RunContext& run, const std::vector<std::vector<int64_t>>& groups) {
  Team team(run.settings.threads);
  run.workers.resize(size_t(team.size()));
  run.cuts.resize(groups.size());
  int64_t total = 0;
  for (const auto& group : groups) total += elements_of(run, group);
  // Below this share of the whole, working alone costs no more waiting at the end than 1/8 of a worker's
  // time.
  const int64_t large = std::max(total / (8 * team.size()), 4 * run.settings.tile);
  std::vector<int64_t> small;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (team.size() == 1 || elements_of(run, groups[g]) < large)
      small.push_back(int64_t(g));
    else
      run_group(run, int64_t(g), groups[g], team, nullptr);
  }
  team.each(int64_t(small.size()), [&](int member, int64_t i) {
    Solo solo(member);
    const int64_t g = small[size_t(i)];
    const int64_t bytes = elements_of(run, groups[size_t(g)]) * 8;
    Buffer* held = bytes / 4 <= kHeldBytes ? &run.workers[size_t(member)].held : nullptr;
    run_group(run, g, groups[size_t(g)], solo, held);
  });
}

}  // namespace pm
