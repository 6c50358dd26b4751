// Blend: the coefficients of a linear map from the inputs' Gram matrix; pymerge/backends/blend.py is the
// same in Python, operation for operation. Host code in f64, a few K x K sums for each vector.
#pragma once
#include <cmath>
#include <vector>

#include "params.h"

namespace pm {

using Coefficients = std::vector<double>;

// Inner products of the inputs, all K x K of them.
class Gram {
 public:
  explicit Gram(int count) : count_(count), product_(size_t(count) * size_t(count)) {}
  int count() const { return count_; }
  double& at(int i, int j) { return product_[size_t(i) * size_t(count_) + size_t(j)]; }
  double at(int i, int j) const { return product_[size_t(i) * size_t(count_) + size_t(j)]; }

  // Takes product(pair) for the pairs (i, j), i <= j, numbered row by row.
  template <class F>
  void fill(F&& product) {
    size_t pair = 0;
    for (int i = 0; i < count_; ++i)
      for (int j = i; j < count_; ++j) at(i, j) = at(j, i) = product(pair++);
  }

 private:
  int count_;
  std::vector<double> product_;
};

// Rounding may lead a cosine past 1; NaN stays.
inline double clamp_cosine(double cosine) { return cosine > 1 ? 1 : cosine < -1 ? -1 : cosine; }

// The geometric mean of two squared norms: exact for equal ones, in range wherever they are.
inline double mean_square(double a, double b) {
  const double product = a * b;
  return product > 1e-290 && product < 1e290 ? std::sqrt(product) : std::sqrt(a) * std::sqrt(b);
}

// The length of a combination of the inputs.
inline double norm_of(const Gram& gram, const Coefficients& parts) {
  double square = 0;
  for (int i = 0; i < gram.count(); ++i) {
    double row = 0;
    for (int j = 0; j < gram.count(); ++j) row += parts[size_t(j)] * gram.at(i, j);
    square += parts[size_t(i)] * row;
  }
  return std::sqrt(square < 0 ? 0 : square);
}

// The point at share t of the arc between two directions.
inline Coefficients along_arc(double cosine, double t) {
  const double angle = std::acos(cosine), sine = std::sin(angle);
  return {std::sin((1 - t) * angle) / sine, std::sin(t * angle) / sine};
}

inline Coefficients slerp(const Gram& gram, double t) {
  constexpr double kLeast = 1e-8 * 1e-8;  // a shorter vector counts as of length 1
  const double square0 = gram.at(0, 0) <= kLeast ? 1 : gram.at(0, 0);
  const double square1 = gram.at(1, 1) <= kLeast ? 1 : gram.at(1, 1);
  const double cosine = clamp_cosine(gram.at(0, 1) / mean_square(square0, square1));
  if (std::fabs(cosine) > 0.9995) return {1 - t, t};
  return along_arc(cosine, t);
}

inline Coefficients nuslerp(const Gram& gram, const std::vector<double>& weight) {
  constexpr double kLeast = 1e-7 * 1e-7, kLeastSineSquared = 1e-14;
  const double total = weight[0] + weight[1];
  const double t = std::fabs(total) < 1e-6 ? 0.5 : weight[1] / total;
  const double square0 = gram.at(0, 0) < kLeast ? kLeast : gram.at(0, 0);
  const double square1 = gram.at(1, 1) < kLeast ? kLeast : gram.at(1, 1);
  const double cosine = clamp_cosine(gram.at(0, 1) / mean_square(square0, square1));
  if (1 - cosine * cosine <= kLeastSineSquared) return {1 - t, t};
  return along_arc(cosine, t);
}

// Empty where three or more directions cancel.
inline Coefficients multislerp(const Gram& gram, const std::vector<double>& weight, bool normalize,
                               double eps) {
  const int count = gram.count();
  if (count == 1) return {1};
  Coefficients shares = weight;
  if (normalize) {
    double total = 0;
    for (double w : weight) total += w;
    for (double& share : shares) share /= total;
  }
  Coefficients parts;
  double scale = 0;
  for (int i = 0; i < count; ++i) {
    const double norm = std::sqrt(gram.at(i, i));
    parts.push_back(norm + eps == 0 ? 0 : shares[size_t(i)] / (norm + eps));
    scale += shares[size_t(i)] * norm;
  }
  const double length = norm_of(gram, parts);
  if (length < eps || length == 0) return count == 2 ? shares : Coefficients{};
  const double factor = std::cos(eps) * scale / length;
  for (double& part : parts) part *= factor;
  return parts;
}

// The mean of unit vectors with the Gram matrix `unit`, as coefficients of them.
inline Coefficients karcher_mean(const Gram& unit, int max_iter, double tol) {
  const int count = unit.count();
  const double share = 1.0 / count;
  Coefficients mean(size_t(count), share), step(size_t(count), 0.0);
  double length = norm_of(unit, mean);
  if (length < tol || length == 0) {
    mean.assign(size_t(count), 0.0);
    mean[0] = 1;
    return mean;
  }
  for (double& part : mean) part /= length;
  for (int turn = 0; turn < max_iter; ++turn) {
    double along = 0;
    for (int i = 0; i < count; ++i) {
      double cosine = 0;
      for (int j = 0; j < count; ++j) cosine += mean[size_t(j)] * unit.at(i, j);
      cosine = clamp_cosine(cosine);
      const double angle = std::acos(cosine), sine = std::sin(angle);
      double pull = 0;
      // On the line of the mean the direction to go is that of the vector itself, or none.
      if (!(angle < tol)) pull = sine < 1e-7 ? (cosine > 0 ? 1 : 0) : angle / sine;
      step[size_t(i)] = share * pull;
      along += share * pull * cosine;
    }
    for (int i = 0; i < count; ++i) step[size_t(i)] = step[size_t(i)] - along * mean[size_t(i)];
    length = norm_of(unit, step);
    if (length < tol || length == 0) break;
    const double stay = std::cos(length), go = std::sin(length) / length;
    for (int i = 0; i < count; ++i) mean[size_t(i)] = stay * mean[size_t(i)] + go * step[size_t(i)];
    length = norm_of(unit, mean);
    for (double& part : mean) part /= length;
  }
  return mean;
}

inline Coefficients karcher(const Gram& gram, int max_iter, double tol) {
  const int count = gram.count();
  constexpr double kLeastSquare = 1e-150;  // what is smaller squared has no direction in f64
  std::vector<int> live;                   // NaN is
  double scale = 0;
  for (int i = 0; i < count; ++i) {
    const double norm = std::sqrt(gram.at(i, i));
    scale += norm;
    if (!(norm <= tol || gram.at(i, i) < kLeastSquare)) live.push_back(i);
  }
  scale /= count;
  Coefficients result(size_t(count), 0.0);
  if (live.empty()) return result;
  Gram unit{int(live.size())};
  for (int i = 0; i < unit.count(); ++i)
    for (int j = 0; j < unit.count(); ++j) {
      const int a = live[size_t(i)], b = live[size_t(j)];
      unit.at(i, j) = gram.at(a, b) / mean_square(gram.at(a, a), gram.at(b, b));
    }
  const Coefficients mean = karcher_mean(unit, max_iter, tol);
  for (int i = 0; i < unit.count(); ++i) {
    const int a = live[size_t(i)];
    result[size_t(a)] = scale * mean[size_t(i)] / std::sqrt(gram.at(a, a));
  }
  return result;
}

inline Coefficients model_stock(const Gram& gram) {
  const int count = gram.count();
  double total = 0;
  int pairs = 0;
  for (int i = 0; i < count; ++i)
    for (int j = i + 1; j < count; ++j, ++pairs) {
      const double product = mean_square(gram.at(i, i), gram.at(j, j));
      total += clamp_cosine(gram.at(i, j) / (product < 1e-6 ? 1e-6 : product));
    }
  const double cosine = total / pairs, divisor = 1 + (count - 1) * cosine;
  const double t = std::fabs(divisor) < 1e-6 ? 0 : count * cosine / divisor;
  return Coefficients(size_t(count), t / count);
}

// One coefficient for each input; empty where the directions cancel.
inline Coefficients coefficients(const Blending& blend, const Gram& gram, const std::vector<double>& weight,
                                 bool normalize) {
  switch (blend.kind) {
    case Blend::slerp: return slerp(gram, blend.t);
    case Blend::nuslerp: return nuslerp(gram, weight);
    case Blend::multislerp: return multislerp(gram, weight, normalize, blend.eps);
    case Blend::karcher: return karcher(gram, blend.max_iter, blend.tol);
    case Blend::model_stock: return model_stock(gram);
    case Blend::none: break;
  }
  return {};
}

}  // namespace pm
