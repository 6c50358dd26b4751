// Ranked random trim: the less likely an entry is kept the smaller it is in its row ("DELLA-Merging: Reducing
// Interference in Model Merging through Magnitude-Based Sampling", 2024, section 3.1).
#pragma once
#include "dtype.h"

namespace pm {

// The share that is kept of the entries of one rank, 0 for the smallest of its row, `last` for the largest.
PM_HD double ranked_density(double density, double epsilon, int64_t rank, int64_t last) {
  const double place = last > 0 ? double(rank) / double(last) : 0.5;
  return (density - epsilon) + (2 * epsilon) * place;
}

// An entry is kept where its random word is below floor(share * 2^32).
PM_HD uint32_t word_limit(double share) {
  return share >= 1 ? ~0u : share > 0 ? uint32_t(share * 0x1p32) : 0;
}

}  // namespace pm
