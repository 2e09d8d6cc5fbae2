// The proximal map of the L1 norm.
#pragma once

#include "rounding.h"

namespace prox_sgd {

// min(max(v, -t), t) for finite t; anything within [-t, t] for a NaN.
PROX_SGD_HD float clamp_(float v, float t) {
#if defined(__CUDA_ARCH__)
  return fminf(fmaxf(v, -t), t);
#else
  const float raised = v > -t ? v : -t;
  return raised < t ? raised : t;
#endif
}
PROX_SGD_HD double clamp_(double v, double t) {
#if defined(__CUDA_ARCH__)
  return fmin(fmax(v, -t), t);
#else
  const double raised = v > -t ? v : -t;
  return raised < t ? raised : t;
#endif
}

// Soft-thresholding: v - t above t, v + t below -t, +0 between, and NaN for a NaN. It is
// v - clamp(v, -t, t), as v - v is +0. C may also be several elements in a vector.
template <typename C>
PROX_SGD_HD C soft_threshold(C v, C t) {
  return sub_(v, clamp_(v, t));
}

// The same, and v itself where the mask is 0. On a GPU a threshold of 0 needs the mask: clamp_(v,
// 0) may be -0 there, and -0 - (-0) is +0.
template <typename C>
PROX_SGD_HD C soft_threshold(C v, C t, uint32_t mask) {
  return sub_(v, keep(clamp_(v, t), mask));
}

// The value, or +0 where zeros are frozen and p, the parameter before the step, is 0.
PROX_SGD_HD float clear_if_zero(float p, uint32_t frozen, float value) {
  return frozen && p == 0.0f ? 0.0f : value;
}
PROX_SGD_HD double clear_if_zero(double p, uint32_t frozen, double value) {
  return frozen && p == 0.0 ? 0.0 : value;
}

}  // namespace prox_sgd
