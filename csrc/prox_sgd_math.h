// The update of one element: the only place in compiled code where it stands.
//
// The CPU and the CUDA kernels include this header. Every rounding is pinned: fma_() is one
// rounding, mul_(), add_() and sub_() are one each, and the build forbids the compiler to contract
// (-ffp-contract=off, --fmad=false), so that all backends give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "prox_sgd.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PROX_SGD_HD __host__ __device__ __forceinline__
#else
#include <cmath>
#define PROX_SGD_HD inline __attribute__((always_inline))
#endif

#if defined(__FAST_MATH__)
#error "the update pins each rounding: build it without -ffast-math and -Ofast"
#endif

namespace prox_sgd {

// ---- storage types -----------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// float32 computes for float32, float16 and bfloat16 storage; float64 for float64.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using compute_t = typename ComputeType<T>::type;

// The storage types of each kind. Without a master, Weight is what the parameter is stored in.
template <typename P, typename G, typename M, typename W, bool kMaster>
struct StorageTypes {
  using Param = P;
  using Grad = G;
  using Momentum = M;
  using Weight = W;
  using Compute = compute_t<W>;
  static constexpr bool has_master = kMaster;
  // Elements that fill 16 bytes of the widest.
  static constexpr int per_unit = static_cast<int>(16 / sizeof(W));
};
template <typename T>
using Uniform = StorageTypes<T, T, T, T, false>;

template <Kind kKind>
struct Types;
template <>
struct Types<Kind::float32> : Uniform<float> {};
template <>
struct Types<Kind::float64> : Uniform<double> {};
template <>
struct Types<Kind::float16> : Uniform<Half> {};
template <>
struct Types<Kind::bfloat16> : Uniform<BFloat16> {};
template <>
struct Types<Kind::float32_momentum_bfloat16> : StorageTypes<float, float, BFloat16, float, false> {
};
template <>
struct Types<Kind::bfloat16_master> : StorageTypes<BFloat16, BFloat16, float, float, true> {};
template <>
struct Types<Kind::bfloat16_master_momentum_bfloat16>
    : StorageTypes<BFloat16, BFloat16, BFloat16, float, true> {};
template <>
struct Types<Kind::float16_master> : StorageTypes<Half, Half, float, float, true> {};

// The arrays of a parameter from some element on. `weight` is what is updated: the master, or the
// parameter itself.
template <typename T>
struct Piece {
  typename T::Param* param;
  const typename T::Grad* grad;
  typename T::Momentum* momentum;
  typename T::Weight* weight;
};

template <typename T>
PROX_SGD_HD Piece<T> piece_from(const Operands& o, int64_t begin) {
  void* weight = T::has_master ? o.master : o.param;
  return {static_cast<typename T::Param*>(o.param) + begin,
          static_cast<const typename T::Grad*>(o.grad) + begin,
          static_cast<typename T::Momentum*>(o.momentum) + begin,
          static_cast<typename T::Weight*>(weight) + begin};
}

template <Kind kKind>
struct KindTag {
  static constexpr Kind kind = kKind;
};

// Calls f(KindTag<kind>()): from a kind that is known when running to one that is when compiling.
template <typename F>
auto with_kind(Kind kind, F&& f) {
  switch (kind) {
    case Kind::float32:
      return f(KindTag<Kind::float32>());
    case Kind::float64:
      return f(KindTag<Kind::float64>());
    case Kind::float16:
      return f(KindTag<Kind::float16>());
    case Kind::bfloat16:
      return f(KindTag<Kind::bfloat16>());
    case Kind::float32_momentum_bfloat16:
      return f(KindTag<Kind::float32_momentum_bfloat16>());
    case Kind::bfloat16_master:
      return f(KindTag<Kind::bfloat16_master>());
    case Kind::bfloat16_master_momentum_bfloat16:
      return f(KindTag<Kind::bfloat16_master_momentum_bfloat16>());
    default:
      return f(KindTag<Kind::float16_master>());
  }
}

template <typename To, typename From>
PROX_SGD_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

PROX_SGD_HD float load(float x) { return x; }
PROX_SGD_HD double load(double x) { return x; }

PROX_SGD_HD float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

PROX_SGD_HD float load(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Moves exponent and mantissa to where float32 has them and raises the exponent by 112;
  // infinities and NaNs get float32's. A subnormal's mantissa is put behind 2^-14, which is then
  // taken away: in float32 it is a normal number, and must be one where a user has subnormals
  // flushed to zero. Free of branches, so that compilers vectorise it.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t smallest_normal = 113u << 23;  // 2^-14
  const float subnormal =
      bit_cast<float>(smallest_normal | magnitude) - bit_cast<float>(smallest_normal);
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t finite = magnitude < 0x00800000u ? bit_cast<uint32_t>(subnormal) : normal;
  const uint32_t finite_or_not = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<float>(finite_or_not | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

PROX_SGD_HD bool is_zero(float x) { return x == 0.0f; }
PROX_SGD_HD bool is_zero(double x) { return x == 0.0; }
PROX_SGD_HD bool is_zero(BFloat16 x) { return (x.bits & 0x7fffu) == 0; }
PROX_SGD_HD bool is_zero(Half x) { return (x.bits & 0x7fffu) == 0; }

// Rounds once, to nearest even; overflow gives an infinity, a NaN stays a NaN.
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
  // Below 2^-14 the result is subnormal: adding 0.5 puts float16's last place, 2^-24, at float32's.
  const float shifted = bit_cast<float>(magnitude) + 0.5f;
  const int32_t subnormal = bit_cast<int32_t>(shifted) - 0x3f000000;
  const int32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  int32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;  // 65520 and more round to infinity
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  return {static_cast<uint16_t>(static_cast<uint32_t>(result) | ((bits >> 16) & 0x8000u))};
#endif
}

// ---- operations with one rounding --------------------------------------------------------------

#if defined(__CUDA_ARCH__)

PROX_SGD_HD float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PROX_SGD_HD float mul_(float a, float b) { return __fmul_rn(a, b); }
PROX_SGD_HD float sub_(float a, float b) { return __fadd_rn(a, -b); }
PROX_SGD_HD double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }
PROX_SGD_HD double mul_(double a, double b) { return __dmul_rn(a, b); }
PROX_SGD_HD double add_(double a, double b) { return __dadd_rn(a, b); }
PROX_SGD_HD double sub_(double a, double b) { return __dadd_rn(a, -b); }
PROX_SGD_HD float div_(float a, float b) { return __fdiv_rn(a, b); }
PROX_SGD_HD double div_(double a, double b) { return __ddiv_rn(a, b); }

#else

#if defined(__FMA__) || defined(__aarch64__)
PROX_SGD_HD float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// A processor without fma. The product is exact in float64; the sum is rounded to odd there, after
// which rounding to float32 is the only rounding that counts (Boldo and Melquiond, "Emulation of
// FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers
// 57(4), 2008). In integers without comparisons, which SSE2 vectorises.
PROX_SGD_HD float fma_(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = c;
  const double sum = product + addend;
  const double addend_part = sum - product;  // TwoSum: sum + error is the exact value
  const double error = (product - (sum - addend_part)) + (addend - addend_part);
  const uint64_t s = bit_cast<uint64_t>(sum);
  const uint64_t e = bit_cast<uint64_t>(error);
  const uint64_t nonzero = ((e << 1) | (uint64_t{0} - (e << 1))) >> 63;
  const uint64_t finite = ((((s >> 52) & 0x7ff) + 1) >> 11) ^ 1;
  const uint64_t inexact = nonzero & finite;
  const uint64_t beyond = inexact & ((s ^ e) >> 63);  // sum was rounded away from zero
  return static_cast<float>(bit_cast<double>((s - beyond) | inexact));
}
#endif
PROX_SGD_HD float mul_(float a, float b) { return a * b; }
PROX_SGD_HD float sub_(float a, float b) { return a - b; }
PROX_SGD_HD double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
PROX_SGD_HD double mul_(double a, double b) { return a * b; }
PROX_SGD_HD double add_(double a, double b) { return a + b; }
PROX_SGD_HD double sub_(double a, double b) { return a - b; }
PROX_SGD_HD float div_(float a, float b) { return a / b; }
PROX_SGD_HD double div_(double a, double b) { return a / b; }

#endif

// ---- the update --------------------------------------------------------------------------------

// Masks are 32 bits wide whatever the compute type is, which saves registers on a GPU: `bits` keeps
// or clears a whole value, `sign` is or-ed or xor-ed into its top word.
PROX_SGD_HD float keep(float x, uint32_t bits) {
  return bit_cast<float>(bit_cast<uint32_t>(x) & bits);
}
PROX_SGD_HD double keep(double x, uint32_t bits) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & (static_cast<uint64_t>(bits) << 32 | bits));
}
PROX_SGD_HD float flip(float x, uint32_t sign) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ sign);
}
PROX_SGD_HD double flip(double x, uint32_t sign) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ static_cast<uint64_t>(sign) << 32);
}

// The value, or +0 where `frozen` is not 0 and p is.
PROX_SGD_HD float clear_if_zero(float p, uint32_t frozen, float value) {
  return frozen && p == 0.0f ? 0.0f : value;
}
PROX_SGD_HD double clear_if_zero(double p, uint32_t frozen, double value) {
  return frozen && p == 0.0 ? 0.0 : value;
}

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

// A group's options in the compute type C: all that a kernel gets to know of them.
//
// There are no branches in the update. An option that is off has coefficients that make its
// operation the identity, bit by bit: x * 1, fma(-0, +0, x), fma(1, x, -0) and x - (+0) are x for
// every x, -0 and NaN included.
template <typename C>
struct Coefficients {
  C minus_lr;
  C momentum;
  C one_minus_dampening;
  C weight_decay;           // -0 where off
  C lookahead;              // nesterov: momentum; 1 where off
  C threshold;              // t1 = lr (l1 k)
  C scale;                  // l2_mode "proximal": r = 1 / (1 + lr (weight_decay k)); 1 where off
  C grad_factor;            // grad_coefficient / grad_scale; 1 where off
  uint32_t ascent;          // maximize: the sign bit
  uint32_t decay_mask;      // coupled weight decay: all ones
  uint32_t lookahead_mask;  // nesterov: all ones
  uint32_t lookahead_sign;  // the sign bit where nesterov is off
  uint32_t shrink_mask;     // threshold not 0: all ones
  uint32_t frozen_zeros;    // all ones: what is 0 stays 0, and there is no threshold
  Momentum mode;
};

// The options that a schedule, a gradient scaler or clipping change from step to step.
struct Varying {
  double lr;
  double l1;
  double gain;            // k
  double proximal_decay;  // weight_decay where l2_mode is "proximal", 0 where it isn't
  float grad_scale;
  float grad_coefficient;
};

// Sets what depends on them: float64 in the order of the formulas, then one rounding to C.
//
// On a GPU nobody has seen them before. A schedule that ends at 0 may end a rounding below it,
// where a step would take every weight off zero: below 0 counts as 0.
template <typename C>
PROX_SGD_HD void set(Coefficients<C>& c, const Varying& v) {
  const double lr = v.lr < 0.0 ? 0.0 : v.lr;
  const double l1 = v.l1 < 0.0 ? 0.0 : v.l1;
  c.minus_lr = static_cast<C>(-lr);
  c.threshold = c.frozen_zeros ? C(0) : static_cast<C>(mul_(lr, mul_(l1, v.gain)));
  c.shrink_mask = c.threshold != C(0) ? 0xffffffffu : 0;
  c.scale = static_cast<C>(div_(1.0, add_(1.0, mul_(lr, mul_(v.proximal_decay, v.gain)))));
  c.grad_factor =
      mul_(div_(C(1), static_cast<C>(v.grad_scale)), static_cast<C>(v.grad_coefficient));
}

// k = (1 - dampening) / (1 - momentum) is the length of the step that heavy-ball momentum makes of
// a constant gradient, in units of lr: with it, the fixed point of the update is the minimiser of
// f(w) + l1 |w|_1 + weight_decay/2 |w|^2 and not that of another l1.
inline Varying varying(const Options& o) {
  const double k = o.momentum == 0.0 ? 1.0 : (1.0 - o.dampening) / (1.0 - o.momentum);
  return {o.lr, o.l1, k, o.proximal ? o.weight_decay : 0.0, o.grad_scale, o.grad_coefficient};
}

template <typename C>
Coefficients<C> coefficients(const Options& o) {
  constexpr uint32_t all = 0xffffffffu;
  constexpr uint32_t sign = 0x80000000u;
  const bool coupled = !o.proximal && o.weight_decay != 0.0;
  const bool nesterov = o.nesterov && o.momentum != 0.0;
  Coefficients<C> c{};
  c.frozen_zeros = o.frozen_zeros ? all : 0;
  set(c, varying(o));
  c.momentum = static_cast<C>(o.momentum);
  c.one_minus_dampening = static_cast<C>(1.0 - o.dampening);
  c.weight_decay = coupled ? static_cast<C>(o.weight_decay) : -C(0);
  c.lookahead = nesterov ? c.momentum : C(1);
  c.ascent = o.maximize ? sign : 0;
  c.decay_mask = coupled ? all : 0;
  c.lookahead_mask = nesterov ? all : 0;
  c.lookahead_sign = nesterov ? 0 : sign;
  c.mode = o.mode();
  return c;
}

// Which of the options an update knows. Options that are off would leave the bits as they are, but
// not the time: on a CPU, the fewer there are, the more of the coefficients stay in registers.
enum class Steps {
  plain,     // momentum, dampening, coupled weight decay, L1
  nesterov,  // the same with Nesterov's momentum
  all,
};

// The least that these coefficients need.
template <typename C>
Steps steps(const Coefficients<C>& c) {
  if (c.ascent || c.frozen_zeros || c.scale != C(1) || c.grad_factor != C(1)) return Steps::all;
  return c.lookahead_mask ? Steps::nesterov : Steps::plain;
}

// One step of one element: p and m in, p and m out. `mode` is passed apart from c.mode so that a
// caller who knows it when compiling can say so, and so is `steps`. What m holds before matters
// only where mode is `running`; without momentum m comes back as d and is nobody's. C may also be
// several elements in a vector.
//
// The L1 proximal map is v - clamp(v, -t, t): v - v is +0, and a NaN stays one whatever its clamp
// is. The mask is for a clamp_ that may give -0 for t = 0, which a CPU's does not.
template <typename C>
PROX_SGD_HD void update(const Coefficients<C>& c, Momentum mode, Steps steps, C& p, C g, C& m) {
  const bool all = steps == Steps::all;
  if (all) g = flip(mul_(g, c.grad_factor), c.ascent);
  const C d = fma_(c.weight_decay, keep(p, c.decay_mask), g);
  const C averaged = fma_(c.one_minus_dampening, d, mul_(c.momentum, m));
  m = mode == Momentum::running ? averaged : d;
  C s = m;
  if (all) s = fma_(c.lookahead, m, flip(keep(d, c.lookahead_mask), c.lookahead_sign));
  if (steps == Steps::nesterov) s = fma_(c.lookahead, m, d);
  const C v = fma_(c.minus_lr, s, p);
  C shrunk = clamp_(v, c.threshold);
  if (all) shrunk = keep(shrunk, c.shrink_mask);
  const C moved = sub_(v, shrunk);
  p = all ? clear_if_zero(p, c.frozen_zeros, mul_(moved, c.scale)) : moved;
}

}  // namespace prox_sgd
