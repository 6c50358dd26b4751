// Where everything lies in the workspace, and the rule as kernels take it.
#pragma once
#include "merge.h"

namespace pm::cuda {

// `bytes`: of the whole. `control`: how much of its start must be zero before the first kernel.
State carve(const Request& request, int64_t* bytes, int64_t* control);
Rule rule_of(const Request& request);

}  // namespace pm::cuda
