// The CPU kernel. Compiled once for each instruction set, with PROX_SGD_SIMD naming it; the loop is
// left to the compiler to vectorise, which the shape of update() allows.
//
// Two objects with different instruction sets share one program, so nothing here may leave a symbol
// that the linker could merge: what the math header offers is always inlined, the rest is local.
#include "kernel.h"

#include "../prox_sgd_math.h"

namespace prox_sgd::cpu::PROX_SGD_SIMD {
namespace {

template <typename T, Momentum kMode>
inline __attribute__((always_inline)) void update_span(const Coefficients<compute_t<T>>& c,
                                                       T* __restrict param,
                                                       const T* __restrict grad,
                                                       T* __restrict momentum, int64_t size) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < size; ++i) {
    C p = load(param[i]);
    C m = kMode == Momentum::running ? load(momentum[i]) : C(0);
    update(c, kMode, p, load(grad[i]), m);
    if (kMode != Momentum::none) momentum[i] = store<T>(m);
    param[i] = store<T>(p);
  }
}

template <typename T, Momentum kMode>
void update_range(const Triple& triple, const void* coefficients, int64_t begin, int64_t end) {
  const auto c = *static_cast<const Coefficients<compute_t<T>>*>(coefficients);
  T* param = static_cast<T*>(triple.param);
  const T* grad = static_cast<const T*>(triple.grad);
  T* momentum = static_cast<T*>(triple.momentum);
  // A cache line of each stream at a time, asking for the one that comes eight lines later, to be
  // used once: hardware prefetchers alone leave a sixth of the bandwidth unused, and lines that
  // nobody reads again soon need not pass through the outer caches (bench/NOTES.md). Asking past
  // the end is harmless.
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kAhead = 8 * kLine;
  int64_t i = begin;
  for (; i + kLine <= end; i += kLine) {
    __builtin_prefetch(param + i + kAhead, 0, 0);
    __builtin_prefetch(grad + i + kAhead, 0, 0);
    if (kMode != Momentum::none) __builtin_prefetch(momentum + i + kAhead, 0, 0);
    update_span<T, kMode>(c, param + i, grad + i, momentum + i, kLine);
  }
  update_span<T, kMode>(c, param + i, grad + i, momentum + i, end - i);
}

template <typename T>
Kernel kernel_for(Momentum mode) {
  switch (mode) {
    case Momentum::none:
      return update_range<T, Momentum::none>;
    case Momentum::first:
      return update_range<T, Momentum::first>;
    default:
      return update_range<T, Momentum::running>;
  }
}

}  // namespace

Kernel kernel(DType dtype, Momentum mode) {
  switch (dtype) {
    case DType::float32:
      return kernel_for<float>(mode);
    case DType::float64:
      return kernel_for<double>(mode);
    case DType::float16:
      return kernel_for<Half>(mode);
    default:
      return kernel_for<BFloat16>(mode);
  }
}

}  // namespace prox_sgd::cpu::PROX_SGD_SIMD
