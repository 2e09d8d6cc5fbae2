// The proximal maps: of the L1 norm, and of both norms of the distance from a start.
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

// Where a equals b and the mask is all ones; and x there, else y.
PROX_SGD_HD bool equal(float a, float b, uint32_t mask) { return mask && a == b; }
PROX_SGD_HD bool equal(double a, double b, uint32_t mask) { return mask && a == b; }
PROX_SGD_HD float choose(bool there, float x, float y) { return there ? x : y; }
PROX_SGD_HD double choose(bool there, double x, double y) { return there ? x : y; }

// Soft-thresholding towards a start, with u = v - start: v - t where u > t, v + t where u < -t, v
// where u is a NaN, else the start itself, to the bit, which start + soft_threshold(u, t) would
// miss by a rounding. v where t is 0. |u| <= t is where clamping u changes nothing.
template <typename C>
PROX_SGD_HD C soft_threshold_towards(C start, C v, C t) {
  constexpr uint32_t all = 0xffffffffu;
  const C u = sub_(v, start);
  const C pull = choose(equal(u, u, all), clamp_(u, t), C(0));  // 0 for a NaN
  const C moved = choose(equal(pull, u, all), start, sub_(v, pull));
  return choose(equal(t, C(0), all), v, moved);
}

// The ridge penalty's proximal map towards a start: start + factor (p - start). p itself where it
// is at the start, so that a zero keeps its sign, and where the factor is 1.
template <typename C>
PROX_SGD_HD C scale_towards(C start, C p, C factor) {
  constexpr uint32_t all = 0xffffffffu;
  const C scaled = fma_(factor, sub_(p, start), start);
  return choose(equal(p, start, all), p, choose(equal(factor, C(1), all), p, scaled));
}

}  // namespace prox_sgd
