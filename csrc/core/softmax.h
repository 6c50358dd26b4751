// exp, log and the terms of a divergence between softmax distributions, in f64 without a C library, so that
// every processor gives the same bits. D: double, or a vector of doubles; I: the integers of its width.
// Several are computed side by side, as each would wait for its own sums. pymerge/backends/scores.py is the
// same in torch, operation for operation.
#pragma once
#include "dtype.h"

namespace pm {

// x = exp(x) for x <= 0; below -700 as at -700. Error below 2e-15, more than the terms' own rounding needs.
template <class I, class D, int kSide>
PM_HD void softmax_exp(D (&x)[kSide]) {
  constexpr double kShift = 0x1.8p52, kLog2e = 1.4426950408889634, kHigh = 0x1.62e42fee00000p-1,
                   kLow = 0x1.a39ef35793c76p-33;
  D r[kSide], sum[kSide];
  I turns[kSide];
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s) {
    x[s] = x[s] < D{} - 700 ? D{} - 700 : x[s];
    const D shifted = x[s] * kLog2e + kShift, whole = shifted - kShift;
    r[s] = (x[s] - whole * kHigh) - whole * kLow;
    sum[s] = D{} + 1.0 / 479001600;
    memcpy(&turns[s], &shifted, sizeof shifted);
  }
  constexpr double kTerms[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                               1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                               1.0 / 6,        0.5,           1.0,          1.0};
#pragma GCC unroll 12
  for (double term : kTerms)
#pragma GCC unroll 4
    for (int s = 0; s < kSide; ++s) sum[s] = sum[s] * r[s] + term;
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s) {
    I scaled;
    D result;
    memcpy(&scaled, &sum[s], sizeof scaled);
    scaled = scaled + (turns[s] << 52);
    memcpy(&result, &scaled, sizeof result);
    x[s] = x[s] != x[s] ? x[s] : result;
  }
}

// x = log(x) for positive normal x.
template <class I, class D, int kSide>
PM_HD void softmax_log(D (&x)[kSide]) {
  constexpr int64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // sqrt(1/2): the mantissa runs from there to sqrt(2)
  constexpr double kShift = 0x1.8p52, kLog2 = 0.6931471805599453;
  D whole[kSide], twice[kSide], z[kSide], sum[kSide];
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s) {
    I bits;
    memcpy(&bits, &x[s], sizeof bits);
    const I turns = (bits - kHalfRoot) >> 52;
    const I rest = bits - (turns << 52), shifted = turns + bit_cast<int64_t>(kShift);
    D m;
    memcpy(&m, &rest, sizeof m);
    memcpy(&whole[s], &shifted, sizeof shifted);
    const D root = (m - 1.0) / (m + 1.0);
    twice[s] = root + root;
    z[s] = root * root;
    sum[s] = D{} + 1.0 / 19;
  }
  constexpr double kTerms[] = {1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,
                               1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
#pragma GCC unroll 9
  for (double term : kTerms)
#pragma GCC unroll 4
    for (int s = 0; s < kSide; ++s) sum[s] = sum[s] * z[s] + term;
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s)
    x[s] = x[s] != x[s] ? x[s] : (whole[s] - kShift) * kLog2 + twice[s] * sum[s];
}

// Each element's part of the divergence of softmax(x) from softmax(base), in place of exp_x: exponentials
// over their sums, plus `eps` each.
template <class I, class D, int kSide>
PM_HD void divergence_terms(D (&exp_x)[kSide], double sum_x, const D (&exp_base)[kSide], double sum_base) {
  constexpr double kEps = 1e-8;
  D ratio[kSide];
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s) {
    exp_x[s] = exp_x[s] / sum_x + kEps;
    ratio[s] = exp_x[s] / (exp_base[s] / sum_base + kEps);
  }
  softmax_log<I>(ratio);
#pragma GCC unroll 4
  for (int s = 0; s < kSide; ++s) exp_x[s] = exp_x[s] * ratio[s];
}

}  // namespace pm
