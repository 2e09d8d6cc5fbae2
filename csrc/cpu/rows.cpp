// The CPU kernels of coupled rows. As elements.cpp, this object is compiled for AVX2 on x86: all
// that it defines is local, and it uses no templates of the standard library that the linker could
// merge with another object's.
#include "rows.h"

#include <cmath>
#include <cstring>

#include "../math/rounding.h"

namespace prox_sgd::cpu {
namespace {

constexpr int64_t kSegment = 512;
constexpr int64_t kLanes = 16;

// Four numbers in a vector of the compiler's, which splits it where a processor has none so wide.
using Doubles = double __attribute__((vector_size(32)));
using Floats4 = float __attribute__((vector_size(16)));

inline __attribute__((always_inline)) Doubles load_four(const float* x) {
  Floats4 four;
  memcpy(&four, x, sizeof four);
  return __builtin_convertvector(four, Doubles);
}
inline __attribute__((always_inline)) Doubles load_four(const double* x) {
  Doubles four;
  memcpy(&four, x, sizeof four);
  return four;
}

// The sum of squares of one segment.
template <typename C>
inline __attribute__((always_inline)) double segment_sum(const C* x, int64_t size) {
  Doubles lanes[kLanes / 4] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t n = 0; n < kLanes / 4; ++n) {
      const Doubles v = load_four(x + i + 4 * n);
      lanes[n] += v * v;
    }
  }
  if (i < size) {  // what is missing counts as 0
    C last[kLanes] = {};
    for (int64_t n = 0; i + n < size; ++n) last[n] = x[i + n];
    for (int64_t n = 0; n < kLanes / 4; ++n) {
      const Doubles v = load_four(last + 4 * n);
      lanes[n] += v * v;
    }
  }
  const Doubles four = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <typename C>
void add_squares(const void* weights, int64_t rows, int64_t width, double* sums) {
  const C* x = static_cast<const C*>(weights);
  if (width == 1) {
    for (int64_t row = 0; row < rows; ++row) {
      const double v = x[row];
      sums[row] += v * v;
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row, x += width) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < width; begin += kSegment) {
      sum += segment_sum(x + begin, begin + kSegment < width ? kSegment : width - begin);
    }
    sums[row] += sum;
  }
}

void to_factors(double* sums, const double* thresholds, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const double t = thresholds[row];
    const double norm = std::sqrt(sums[row]);
    double factor = norm <= t ? 0.0 : 1.0 - t / norm;
    if (t == 0.0) factor = 1.0;
    sums[row] = factor;
  }
}

template <typename P, typename C>
int64_t scale(void* param, void* weights, int64_t rows, int64_t width, const double* factors,
              double ridge, bool counts) {
  const C r = static_cast<C>(ridge);
  const bool in_place = param == weights;
  int64_t num_zeros = 0;
  for (int64_t row = 0; row < rows; ++row) {
    C* const w = static_cast<C*>(weights) + row * width;
    P* const p = static_cast<P*>(param) + row * width;
    const C factor = static_cast<C>(factors[row]);
    if (factor == C(0)) {
      memset(w, 0, static_cast<size_t>(width) * sizeof(C));
    } else if (factor != C(1) || r != C(1)) {
      for (int64_t i = 0; i < width; ++i) w[i] = mul_(mul_(w[i], factor), r);
    }
    if (!in_place) {
      for (int64_t i = 0; i < width; ++i) p[i] = store<P>(w[i]);
    }
    if (counts) {
      int64_t zeros = 0;
      for (int64_t i = 0; i < width; ++i) zeros += is_zero(p[i]) ? 1 : 0;
      num_zeros += zeros;
    }
  }
  return num_zeros;
}

template <typename P>
void widen(const void* from, float* to, int64_t size) {
  const P* const x = static_cast<const P*>(from);
  for (int64_t i = 0; i < size; ++i) to[i] = load(x[i]);
}

template <typename P>
void narrow(const float* from, void* to, int64_t size) {
  P* const x = static_cast<P*>(to);
  for (int64_t i = 0; i < size; ++i) x[i] = store<P>(from[i]);
}

}  // namespace

RowKernels row_kernels_for(Storage storage) {
  return with_storage(storage, [](auto tag) {
    using T = TypesOf<decltype(tag)::storage>;
    using P = typename T::Param;
    using C = typename T::Compute;
    RowKernels kernels{sizeof(P),
                       sizeof(typename T::Grad),
                       sizeof(typename T::MomentumBuffer),
                       sizeof(C),
                       add_squares<C>,
                       to_factors,
                       scale<P, C>,
                       nullptr,
                       nullptr};
    if constexpr (sizeof(P) == 2 && !T::has_master) {
      kernels.widen = widen<P>;
      kernels.narrow = narrow<P>;
    }
    return kernels;
  });
}

}  // namespace prox_sgd::cpu
