// The group lasso's proximal map of one row of a set: it multiplies the row, or the row's distance
// from its start, with a factor.
#pragma once

#include "rounding.h"

namespace prox_sgd {

// The threshold t = (lr lasso) a_g, with lasso = group_lasso k; all in float64, in this order.
PROX_SGD_HD double row_threshold(double lr, double lasso, double weight) {
  return mul_(mul_(lr, lasso), weight);
}

// 1 - t / norm, and 0 up to the threshold, for the row's sum of squares; NaN for a NaN, and 1 where
// t is 0.
PROX_SGD_HD double row_factor(double sum, double t) {
  const double norm = sqrt_(sum);
  const double factor = norm <= t ? 0.0 : sub_(1.0, div_(t, norm));
  return t == 0.0 ? 1.0 : factor;
}

// An element of a row whose distance from its start is multiplied with the row's factor: start +
// factor (p - start), each operation rounded, and factor p where the start is 0, so that a zero
// keeps its sign. The start itself for a factor of 0, and p for one of 1. No fma: PyTorch has none
// that takes a tensor as factor.
template <typename C>
PROX_SGD_HD C scale_row_towards(C start, C p, C factor) {
  const C product = mul_(factor, sub_(p, start));
  const C scaled = start == C(0) ? product : add_(start, product);
  const C moved = factor == C(1) ? p : scaled;
  return factor == C(0) ? start : moved;
}

}  // namespace prox_sgd
