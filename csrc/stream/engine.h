// Runs a list of jobs: large groups by the whole team, small ones one per worker.
#pragma once
#include "merge.h"

namespace pm {

// `groups`: job numbers that share thresholds, in flat-index order. Throws StreamError or Cancelled.
void run_jobs(RunContext& run, const std::vector<std::vector<int64_t>>& groups);

}  // namespace pm
