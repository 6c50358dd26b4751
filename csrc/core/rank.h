// Ranked random trim: the less likely an entry is kept the smaller it is in its row ("DELLA-Merging: Reducing
// Interference in Model Merging through Magnitude-Based Sampling", 2024, section 3.1).
#pragma once
#include "trim.h"

namespace pm {

// The share that is kept of the entries of one rank, 0 for the smallest of its row, `last` for the largest.
PM_HD double ranked_density(double density, double epsilon, int64_t rank, int64_t last) {
  const double place = last > 0 ? double(rank) / double(last) : 0.5;
  return (density - epsilon) + (2 * epsilon) * place;
}

}  // namespace pm
