// Operations with exactly one rounding, to nearest even, the same on every processor.
//
// fma_() rounds once, and so does each of mul_(), add_(), sub_(), div_() and sqrt_(). The build
// forbids the compiler to contract them (-ffp-contract=off, --fmad=false): all backends give the
// same bits.
#pragma once

#include "float_types.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

#if defined(__FAST_MATH__)
#error "the update pins each rounding: build it without -ffast-math and -Ofast"
#endif

namespace prox_sgd {

#if defined(__CUDA_ARCH__)

PROX_SGD_HD float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PROX_SGD_HD float mul_(float a, float b) { return __fmul_rn(a, b); }
PROX_SGD_HD float add_(float a, float b) { return __fadd_rn(a, b); }
PROX_SGD_HD float sub_(float a, float b) { return __fadd_rn(a, -b); }
PROX_SGD_HD double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
PROX_SGD_HD double mul_(double a, double b) { return __dmul_rn(a, b); }
PROX_SGD_HD double add_(double a, double b) { return __dadd_rn(a, b); }
PROX_SGD_HD double sub_(double a, double b) { return __dadd_rn(a, -b); }
PROX_SGD_HD float div_(float a, float b) { return __fdiv_rn(a, b); }
PROX_SGD_HD double div_(double a, double b) { return __ddiv_rn(a, b); }
PROX_SGD_HD double sqrt_(double a) { return __dsqrt_rn(a); }

#else

PROX_SGD_HD float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PROX_SGD_HD float mul_(float a, float b) { return a * b; }
PROX_SGD_HD float add_(float a, float b) { return a + b; }
PROX_SGD_HD float sub_(float a, float b) { return a - b; }
PROX_SGD_HD double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
PROX_SGD_HD double mul_(double a, double b) { return a * b; }
PROX_SGD_HD double add_(double a, double b) { return a + b; }
PROX_SGD_HD double sub_(double a, double b) { return a - b; }
PROX_SGD_HD float div_(float a, float b) { return a / b; }
PROX_SGD_HD double div_(double a, double b) { return a / b; }
PROX_SGD_HD double sqrt_(double a) { return __builtin_sqrt(a); }

#endif

// From the compute type to storage. Overflow gives an infinity; a NaN stays a NaN.
template <typename T>
PROX_SGD_HD T store(compute_t<T> x) {
  return x;
}

template <>
PROX_SGD_HD BFloat16 store<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
#endif
}

template <>
PROX_SGD_HD Half store<Half>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  // Below 2^-14 the result is subnormal: adding 0.5 aligns float16's last place, 2^-24, with
  // float32's, so the addition rounds.
  const float shifted = bit_cast<float>(magnitude) + 0.5f;
  const int32_t subnormal = bit_cast<int32_t>(shifted) - 0x3f000000;
  const int32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  int32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;  // 65520 and more round to infinity
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  return {static_cast<uint16_t>(static_cast<uint32_t>(result) | ((bits >> 16) & 0x8000u))};
#endif
}

// Whether a parameter is at its start, as it is stored: a master's start is rounded.
template <typename P, typename W>
PROX_SGD_HD bool is_at_start(P param, W start) {
  return load(param) == load(store<P>(load(start)));
}

}  // namespace prox_sgd
