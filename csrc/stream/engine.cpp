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
void merge_one(Group<Work>& group, Crew& crew) {
  const Rule& rule = group.rule();
  if (rule.blend.kind != Blend::none)
    blend_group(group, crew);
  else if (by_mask(rule.trim) || rule.fuse != Fuse::none)
    masked_group(group, crew);
  else
    merge_group(group, crew);
}

template <class Work>
void merge_family(RunContext& run, const Family& family, int64_t number, Crew& crew, Buffer* held) {
  Variants<Work> variants(run, family, number);
  Group<Work>& first = variants.first();
  const TensorJob& job = first.views[0].job();
  if (held && first.views.size() == 1 && by_magnitude(first.rule().trim) && job.out.file != kInMemory)
    first.views[0].hold(held->reserve(size_t(job.count) * size_t(job.out.item)));
  variants.search(crew);
  variants.merge(crew, [&](Group<Work>& group) { merge_one(group, crew); });
  for (const JobView& view : first.views) {
    view.flush();
    if (run.settings.drop_behind) view.drop_behind();
  }
}

void merge_or_copy(RunContext& run, Family family, int64_t number, Crew& crew, Buffer* held) {
  for (auto& jobs : family)
    std::erase_if(jobs, [&](int64_t job) { return run.jobs[size_t(job)].count == 0; });
  if (family[0].empty()) return;
  for (const auto& jobs : family)
    for (int64_t job : jobs) {
      run.report.elements += run.jobs[size_t(job)].count;
      run.report.bytes_written += run.jobs[size_t(job)].count * run.jobs[size_t(job)].out.item;
    }
  Family merged;  // a rule may copy where another one scales
  for (auto& jobs : family) {
    if (run.jobs[size_t(jobs[0])].rule < 0)
      copy_equal(run, jobs[0], crew);
    else
      merged.push_back(std::move(jobs));
  }
  if (merged.empty()) return;
  const bool in_double = std::any_of(merged[0].begin(), merged[0].end(), [&](int64_t job) {
    return JobView::natural_kernel(run.jobs[size_t(job)]) == DType::f64;
  });
  in_double ? merge_family<double>(run, merged, number, crew, held)
            : merge_family<float>(run, merged, number, crew, held);
}

void run_family(RunContext& run, const Family& family, int64_t number, Crew& crew, Buffer* held) {
  merge_or_copy(run, family, number, crew, held);
  for (int64_t number : family[0]) {
    const TensorJob& job = run.jobs[size_t(number)];
    for (int i = 0; i < job.inputs; ++i) release(run, job.input[i]);
  }
  for (const auto& jobs : family)
    for (int64_t number : jobs) run.finished[size_t(number)] = true;
}

}  // namespace

void run_jobs(RunContext& run, const std::vector<Family>& families) {
  Team team(run.settings.threads);
  run.workers.resize(size_t(team.size()));
  // Groups are numbered family by family, variant by variant.
  std::vector<int64_t> numbers;
  int64_t groups = 0, total = 0;
  for (const Family& family : families) {
    numbers.push_back(groups);
    groups += int64_t(family.size());
    total += elements_of(run, family[0]);
  }
  run.cuts.resize(size_t(groups));
  // Below this share of the whole, working alone costs no more waiting at the end than 1/8 of a worker's
  // time.
  const int64_t large = std::max(total / (8 * team.size()), 4 * run.settings.tile);
  std::vector<int64_t> small;
  for (size_t f = 0; f < families.size(); ++f) {
    if (team.size() == 1 || elements_of(run, families[f][0]) < large)
      small.push_back(int64_t(f));
    else
      run_family(run, families[f], numbers[f], team, nullptr);
  }
  team.each(int64_t(small.size()), [&](int member, int64_t i) {
    Solo solo(member);
    const size_t f = size_t(small[size_t(i)]);
    const int64_t bytes = elements_of(run, families[f][0]) * 8;
    Buffer* held = bytes / 4 <= kHeldBytes ? &run.workers[size_t(member)].held : nullptr;
    run_family(run, families[f], numbers[f], solo, held);
  });
}

}  // namespace pm
