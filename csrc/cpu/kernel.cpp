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
void update_range(const Triple& triple, const void* opaque, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const Coefficients<C> c = *static_cast<const Coefficients<C>*>(opaque);
  T* __restrict param = static_cast<T*>(triple.param);
  const T* __restrict grad = static_cast<const T*>(triple.grad);
  T* __restrict momentum = static_cast<T*>(triple.momentum);
  for (int64_t i = begin; i < end; ++i) {
    C p = load(param[i]);
    C m = kMode == Momentum::running ? load(momentum[i]) : C(0);
    update(c, kMode, p, load(grad[i]), m);
    if (kMode != Momentum::none) momentum[i] = store<T>(m);
    param[i] = store<T>(p);
  }
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
