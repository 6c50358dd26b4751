// Runs a list of jobs: large groups by the whole team, small ones one per worker.
#pragma once
#include "variants.h"

namespace pm {

// Each family: the jobs that share thresholds, in flat-index order, for every variant. Throws StreamError or
// Cancelled.
void run_jobs(RunContext& run, const std::vector<Family>& families);

}  // namespace pm
