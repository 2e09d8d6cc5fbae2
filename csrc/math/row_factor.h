// The group lasso's proximal map of one row of a set: it multiplies the row with a factor.
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

}  // namespace prox_sgd
