// The CPU kernel. Compiled once for each instruction set, with PROX_SGD_SIMD naming it; the loop is
// left to the compiler to vectorise, which the shape of update() allows.
//
// Two objects with different instruction sets share one program, so nothing here may leave a symbol
// that the linker could merge: what the math header offers is always inlined, the rest is local.
#include "kernel.h"

#include <type_traits>

#include "../prox_sgd_math.h"

namespace prox_sgd::cpu::PROX_SGD_SIMD {
namespace {

// kExtras: whether zeros are counted or frozen, or gradients multiplied. Returns the zeros if so.
template <typename T, Momentum kMode, bool kExtras>
inline __attribute__((always_inline)) int64_t
update_span(const Coefficients<typename T::Compute>& c, typename T::Param* __restrict param,
            const typename T::Grad* __restrict grad, typename T::Momentum* __restrict momentum,
            typename T::Weight* __restrict weight, int64_t size) {
  using C = typename T::Compute;
  // Counted in a type as wide as what is compared: other widths cost instructions.
  std::conditional_t<sizeof(C) == 8, int64_t, int32_t> zeros = 0;
  for (int64_t i = 0; i < size; ++i) {
    C p;
    if constexpr (T::has_master) {
      p = load(weight[i]);
    } else {
      p = load(param[i]);
    }
    C m = kMode == Momentum::running ? load(momentum[i]) : C(0);
    update(c, kMode, kExtras, p, load(grad[i]), m);
    if (kMode != Momentum::none) momentum[i] = store<typename T::Momentum>(m);
    if constexpr (T::has_master) weight[i] = store<typename T::Weight>(p);
    // Never held as a local struct, nor a bool added: GCC would leave 16-bit loops scalar, which is
    // nine times slower (tests/instructions.py).
    param[i] = store<typename T::Param>(p);
    if constexpr (kExtras) zeros += is_zero(param[i]) ? 1 : 0;
  }
  return zeros;
}

template <typename T, Momentum kMode, bool kExtras>
int64_t update_range(const Operands& operands, const void* coefficients, int64_t begin,
                     int64_t end) {
  const auto c = *static_cast<const Coefficients<typename T::Compute>*>(coefficients);
  auto* param = static_cast<typename T::Param*>(operands.param);
  const auto* grad = static_cast<const typename T::Grad*>(operands.grad);
  auto* momentum = static_cast<typename T::Momentum*>(operands.momentum);
  auto* weight = static_cast<typename T::Weight*>(operands.master);
  // A cache line of the widest stream at a time, asking for the one that comes eight lines later,
  // to be used once: hardware prefetchers alone leave a sixth of the bandwidth unused, and lines
  // that nobody reads again soon need not pass through the outer caches (bench/NOTES.md). Asking
  // past the end is harmless.
  constexpr int64_t kLine = 64 / sizeof(typename T::Weight);
  constexpr int64_t kAhead = 8 * kLine;
  int64_t zeros = 0;
  int64_t i = begin;
  for (; i + kLine <= end; i += kLine) {
    __builtin_prefetch(param + i + kAhead, 0, 0);
    __builtin_prefetch(grad + i + kAhead, 0, 0);
    if (kMode != Momentum::none) __builtin_prefetch(momentum + i + kAhead, 0, 0);
    if constexpr (T::has_master) __builtin_prefetch(weight + i + kAhead, 0, 0);
    zeros +=
        update_span<T, kMode, kExtras>(c, param + i, grad + i, momentum + i, weight + i, kLine);
  }
  zeros +=
      update_span<T, kMode, kExtras>(c, param + i, grad + i, momentum + i, weight + i, end - i);
  return zeros;
}

template <typename T, bool kExtras>
Kernel kernel_for(Momentum mode) {
  switch (mode) {
    case Momentum::none:
      return update_range<T, Momentum::none, kExtras>;
    case Momentum::first:
      return update_range<T, Momentum::first, kExtras>;
    default:
      return update_range<T, Momentum::running, kExtras>;
  }
}

}  // namespace

Kernel kernel(Kind kind, Momentum mode, bool extras) {
  return with_kind(kind, [&](auto tag) {
    using T = Types<decltype(tag)::kind>;
    return extras ? kernel_for<T, true>(mode) : kernel_for<T, false>(mode);
  });
}

}  // namespace prox_sgd::cpu::PROX_SGD_SIMD
