// Sixteen float32 in two AVX2 vectors: the update's operations, and loads and stores of 16-bit
// storage, which compilers vectorise up to five times slower. Two vectors, so that one computes
// while the other waits for its results. All is always inlined: see elements.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../math/update.h"

namespace prox_sgd::cpu {

struct Floats {
  static constexpr int64_t kCount = 16;

  Floats() = default;
  PROX_SGD_HD Floats(__m256 first, __m256 second) : low(first), high(second) {}
  PROX_SGD_HD explicit Floats(float x) : low(_mm256_set1_ps(x)), high(low) {}

  __m256 low;
  __m256 high;
};

PROX_SGD_HD __m256 bits_of(uint32_t mask) {
  return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(mask)));
}

// The operations of update().
PROX_SGD_HD Floats fma_(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
PROX_SGD_HD Floats mul_(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
PROX_SGD_HD Floats sub_(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
PROX_SGD_HD Floats keep(Floats x, uint32_t bits) {
  return {_mm256_and_ps(x.low, bits_of(bits)), _mm256_and_ps(x.high, bits_of(bits))};
}
PROX_SGD_HD Floats flip(Floats x, uint32_t sign) {
  return {_mm256_xor_ps(x.low, bits_of(sign)), _mm256_xor_ps(x.high, bits_of(sign))};
}
// For a NaN, and for zeros of unlike sign, the instructions give the second operand: they are
// v > -t ? v : -t and v < t ? v : t.
PROX_SGD_HD Floats clamp_(Floats v, Floats t) {
  const Floats minus_t = flip(t, 0x80000000u);
  return {_mm256_min_ps(_mm256_max_ps(v.low, minus_t.low), t.low),
          _mm256_min_ps(_mm256_max_ps(v.high, minus_t.high), t.high)};
}
PROX_SGD_HD Floats zeros_of(Floats x) {
  return {_mm256_cmp_ps(x.low, _mm256_setzero_ps(), _CMP_EQ_OQ),
          _mm256_cmp_ps(x.high, _mm256_setzero_ps(), _CMP_EQ_OQ)};
}
PROX_SGD_HD Floats clear_if_zero(Floats p, uint32_t frozen, Floats value) {
  const Floats cleared = keep(zeros_of(p), frozen);
  return {_mm256_andnot_ps(cleared.low, value.low), _mm256_andnot_ps(cleared.high, value.high)};
}

PROX_SGD_HD Floats equal(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ)};
}
PROX_SGD_HD Floats equal(Floats a, Floats b, uint32_t mask) { return keep(equal(a, b), mask); }
PROX_SGD_HD Floats choose(Floats there, Floats x, Floats y) {
  return {_mm256_blendv_ps(y.low, x.low, there.low), _mm256_blendv_ps(y.high, x.high, there.high)};
}

PROX_SGD_HD Coefficients<Floats> broadcast(const Coefficients<float>& c) {
  return {Floats(c.minus_lr),     Floats(c.momentum),    Floats(c.one_minus_dampening),
          Floats(c.weight_decay), Floats(c.lookahead),   Floats(c.threshold),
          Floats(c.scale),        Floats(c.grad_factor), c.ascent,
          c.decay_mask,           c.lookahead_mask,      c.lookahead_sign,
          c.shrink_mask,          c.frozen_zeros,        c.mode};
}

// ---- sixteen elements in memory ----------------------------------------------------------------

PROX_SGD_HD Floats load_floats(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}

PROX_SGD_HD __m256i load_16_bits(const void* x) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}

// From 0 1 2 3 to 0 2 1 3, in units of 64 bits: instructions that unpack or pack work on the two
// halves of a vector separately.
PROX_SGD_HD __m256i swap_middle(__m256i x) { return _mm256_permute4x64_epi64(x, 0xd8); }

PROX_SGD_HD Floats load_floats(const BFloat16* x) {
  const __m256i bits = swap_middle(load_16_bits(x));
  const __m256i zero = _mm256_setzero_si256();
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, bits)),
          _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, bits))};
}

PROX_SGD_HD Floats load_floats(const Half* x) {
  const __m256i bits = load_16_bits(x);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}

// Eight numbers whose sum is minus the number of elements that are all ones; the others are 0.
PROX_SGD_HD __m256i minus_true(Floats truth) {
  return _mm256_add_epi32(_mm256_castps_si256(truth.low), _mm256_castps_si256(truth.high));
}

// Sixteen results of store<T>().
template <typename T>
struct Stored;

template <>
struct Stored<float> {
  PROX_SGD_HD explicit Stored(Floats x) : value(x) {}
  PROX_SGD_HD void write(float* to) const {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
  }
  // Eight numbers whose sum is minus the number of zeros.
  PROX_SGD_HD __m256i minus_zeros() const { return minus_true(zeros_of(value)); }
  Floats value;
};

struct Stored16Bits {
  PROX_SGD_HD void write(void* to) const { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
  PROX_SGD_HD __m256i minus_zeros() const {
    const __m256i without_sign = _mm256_add_epi16(value, value);
    const __m256i zeros = _mm256_cmpeq_epi16(without_sign, _mm256_setzero_si256());
    return _mm256_madd_epi16(zeros, _mm256_set1_epi16(1));
  }
  __m256i value;
};

template <>
struct Stored<BFloat16> : Stored16Bits {
  PROX_SGD_HD explicit Stored(Floats x) {
    value = swap_middle(_mm256_packus_epi32(rounded(x.low), rounded(x.high)));
  }
  PROX_SGD_HD static __m256i rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i raised = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));
    const __m256 sum = _mm256_castsi256_ps(_mm256_add_epi32(raised, odd));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(sum, bits_of(0x7fc00000u), nan);
    return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  }
};

template <>
struct Stored<Half> : Stored16Bits {
  PROX_SGD_HD explicit Stored(Floats x) {
    value = _mm256_set_m128i(rounded(x.high), rounded(x.low));
  }
  PROX_SGD_HD static __m128i rounded(__m256 x) {
    // vcvtps2ph would keep a part of a NaN's payload; store() doesn't.
    const __m256 quiet = _mm256_or_ps(_mm256_and_ps(x, bits_of(0x80000000u)), bits_of(0x7fc00000u));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_cvtps_ph(_mm256_blendv_ps(x, quiet, nan), _MM_FROUND_TO_NEAREST_INT);
  }
};

}  // namespace prox_sgd::cpu
