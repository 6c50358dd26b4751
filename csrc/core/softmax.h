// exp, log and the terms of a divergence between softmax distributions, in f64 without a C library, so that
// every processor gives the same bits. D: double, or a vector of doubles; I: the integers of its width.
// pymerge/backends/scores.py is the same in torch, operation for operation.
#pragma once
#include "dtype.h"

namespace pm {

// exp(x) for x <= 0; below -700 as at -700. Error below 2e-15, more than the terms' own rounding needs.
template <class D, class I>
PM_HD D softmax_exp(D x) {
  constexpr double kShift = 0x1.8p52, kLog2e = 1.4426950408889634, kHigh = 0x1.62e42fee00000p-1,
                   kLow = 0x1.a39ef35793c76p-33;
  x = x < D{} - 700 ? D{} - 700 : x;
  const D shifted = x * kLog2e + kShift, turns = shifted - kShift;
  const D r = (x - turns * kHigh) - turns * kLow;
  D sum = D{} + 1.0 / 479001600;
  constexpr double kTerms[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                               1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                               1.0 / 6,        0.5,           1.0,          1.0};
#pragma GCC unroll 12
  for (double term : kTerms) sum = sum * r + term;
  I bits, scale;
  memcpy(&bits, &shifted, sizeof bits);
  memcpy(&scale, &sum, sizeof scale);
  scale = scale + (bits << 52);
  memcpy(&sum, &scale, sizeof sum);
  return x != x ? x : sum;
}

// log(x) for positive normal x.
template <class D, class I>
PM_HD D softmax_log(D x) {
  constexpr int64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // sqrt(1/2): the mantissa runs from there to sqrt(2)
  constexpr double kShift = 0x1.8p52, kLog2 = 0.6931471805599453;
  I bits, turns;
  memcpy(&bits, &x, sizeof bits);
  turns = (bits - kHalfRoot) >> 52;
  const I rest = bits - (turns << 52), shifted = turns + bit_cast<int64_t>(kShift);
  D m, whole;
  memcpy(&m, &rest, sizeof m);
  memcpy(&whole, &shifted, sizeof whole);
  const D s = (m - 1.0) / (m + 1.0), z = s * s;
  D sum = D{} + 1.0 / 19;
  constexpr double kTerms[] = {1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9,
                               1.0 / 7,  1.0 / 5,  1.0 / 3,  1.0};
#pragma GCC unroll 9
  for (double term : kTerms) sum = sum * z + term;
  return x != x ? x : (whole - kShift) * kLog2 + (s + s) * sum;
}

// One element's part of the divergence of softmax(x) from softmax(base): exponentials over their sums, plus
// `eps` each.
template <class D, class I>
PM_HD D divergence_term(D exp_x, D sum_x, D exp_base, D sum_base) {
  constexpr double kEps = 1e-8;
  const D p = exp_x / sum_x + kEps, q = exp_base / sum_base + kEps;
  return p * softmax_log<D, I>(p / q);
}

}  // namespace pm
