// The CPU kernel. Compiled once for each instruction set, with PROX_SGD_SIMD naming it. With AVX2,
// float32 is computed in vectors that are spelled out; the rest is left to the compiler to
// vectorise, which the shape of update() allows.
//
// Two objects with different instruction sets share one program, so nothing here may leave a symbol
// that the linker could merge: what the headers offer is always inlined, the rest is local.
#include "kernel.h"

#include <type_traits>

#include "../prox_sgd_math.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PROX_SGD_HAS_LANES
#include "lanes.h"
#endif

namespace prox_sgd::cpu::PROX_SGD_SIMD {
namespace {

// What is compiled apart from the rest.
template <Momentum kMomentum, Steps kStepsTaken, bool kCounted>
struct Variant {
  static constexpr Momentum kMode = kMomentum;
  static constexpr Steps kSteps = kStepsTaken;
  static constexpr bool kCounts = kCounted;
};

// Updates `size` elements. Returns the zeros if they are counted. The arrays are parameters, as
// that is where GCC believes __restrict; `weight` counts with a master only.
template <typename T, typename V>
inline __attribute__((always_inline)) int64_t
update_each(const Coefficients<typename T::Compute>& c, typename T::Param* __restrict param,
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
    C m = V::kMode == Momentum::running ? load(momentum[i]) : C(0);
    update(c, V::kMode, V::kSteps, p, load(grad[i]), m);
    if (V::kMode != Momentum::none) momentum[i] = store<typename T::Momentum>(m);
    if constexpr (T::has_master) weight[i] = store<typename T::Weight>(p);
    // Never held as a local struct, nor a bool added: GCC would leave 16-bit loops scalar, which is
    // nine times slower (tests/gates/instructions.py).
    param[i] = store<typename T::Param>(p);
    if constexpr (V::kCounts) zeros += is_zero(param[i]) ? 1 : 0;
  }
  return zeros;
}

template <typename T, typename V>
inline __attribute__((always_inline)) int64_t update_each(
    const Coefficients<typename T::Compute>& c, const Piece<T>& at, int64_t begin, int64_t size) {
  // Where there is no buffer, its pointer is null, which nothing may be added to.
  auto* momentum = V::kMode == Momentum::none ? at.momentum : at.momentum + begin;
  return update_each<T, V>(c, at.param + begin, at.grad + begin, momentum, at.weight + begin, size);
}

// A number of elements that make up whole cache lines of the widest array.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(typename T::Weight);

// Asks for lines to be used once: hardware prefetchers alone leave a sixth of the bandwidth unused,
// and lines that nobody reads again soon need not pass through the outer caches (bench/NOTES.md).
// Asking past the end is harmless. `i` is the element whose lines to ask for.
template <typename T, typename V>
inline __attribute__((always_inline)) void prefetch(const Piece<T>& at, int64_t i) {
  __builtin_prefetch(at.param + i, 0, 0);
  __builtin_prefetch(at.grad + i, 0, 0);
  if (V::kMode != Momentum::none) __builtin_prefetch(at.momentum + i, 0, 0);
  if constexpr (T::has_master) __builtin_prefetch(at.weight + i, 0, 0);
}

#if defined(PROX_SGD_HAS_LANES)

// Updates as many elements from i on as Floats holds.
template <typename T, typename V>
inline __attribute__((always_inline)) void update_lanes(const Coefficients<Floats>& c,
                                                        const Piece<T>& at, int64_t i,
                                                        __m256i& minus_zeros) {
  Floats p = load_lanes(at.weight + i);
  Floats m(0.0f);
  if (V::kMode == Momentum::running) m = load_lanes(at.momentum + i);
  update(c, V::kMode, V::kSteps, p, load_lanes(at.grad + i), m);
  if (V::kMode != Momentum::none) Stored<typename T::Momentum>(m).write(at.momentum + i);
  if constexpr (T::has_master) Stored<typename T::Weight>(p).write(at.weight + i);
  const Stored<typename T::Param> stored(p);
  stored.write(at.param + i);
  if (V::kCounts) minus_zeros = _mm256_add_epi32(minus_zeros, stored.minus_zeros());
}

// The zeros of a range, a chunk at the most, are counted in 32 bits.
template <typename T, typename V>
int64_t update_floats(const Coefficients<float>& coefficients, const Piece<T>& at, int64_t begin,
                      int64_t end, int64_t ahead) {
  const Coefficients<Floats> c = spread(coefficients);
  __m256i minus_zeros = _mm256_setzero_si256();
  int64_t i = begin;
  for (; i + kLine<T> <= end; i += kLine<T>) {
    prefetch<T, V>(at, i + ahead);
    for (int64_t j = 0; j < kLine<T>; j += Floats::kCount) {
      update_lanes<T, V>(c, at, i + j, minus_zeros);
    }
  }
  for (; i + Floats::kCount <= end; i += Floats::kCount) {
    update_lanes<T, V>(c, at, i, minus_zeros);
  }
  alignas(32) int32_t counts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(counts), minus_zeros);
  int64_t zeros = update_each<T, V>(coefficients, at, i, end - i);
  for (const int32_t count : counts) zeros -= count;
  return zeros;
}

#endif

template <typename T, typename V>
int64_t update_range(const Operands& operands, const void* coefficients, int64_t begin, int64_t end,
                     int64_t lines_ahead) {
  using C = typename T::Compute;
  const auto c = *static_cast<const Coefficients<C>*>(coefficients);
  const auto at = piece_from<T>(operands, 0);
  const int64_t ahead = lines_ahead * kLine<T>;
#if defined(PROX_SGD_HAS_LANES)
  if constexpr (std::is_same_v<C, float>) return update_floats<T, V>(c, at, begin, end, ahead);
#endif
  int64_t zeros = 0;
  int64_t i = begin;
  for (; i + kLine<T> <= end; i += kLine<T>) {
    prefetch<T, V>(at, i + ahead);
    zeros += update_each<T, V>(c, at, i, kLine<T>);
  }
  return zeros + update_each<T, V>(c, at, i, end - i);
}

// Where fma is emulated, that takes most of the time, and most of a compiler's: few variants then.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

template <typename T, Momentum kMode>
Kernel kernel_for(Steps steps, bool counts) {
  if (steps == Steps::plain && !counts) return update_range<T, Variant<kMode, Steps::plain, false>>;
  if constexpr (kHasFma) {
    if (steps == Steps::plain) return update_range<T, Variant<kMode, Steps::plain, true>>;
    if constexpr (kMode != Momentum::none) {
      if (steps == Steps::nesterov) {
        return counts ? update_range<T, Variant<kMode, Steps::nesterov, true>>
                      : update_range<T, Variant<kMode, Steps::nesterov, false>>;
      }
    }
  }
  return update_range<T, Variant<kMode, Steps::all, true>>;
}

}  // namespace

Kernel kernel(Kind kind, Momentum mode, Steps steps, bool counts) {
  return with_kind(kind, [&](auto tag) {
    using T = Types<decltype(tag)::kind>;
    switch (mode) {
      case Momentum::none:
        return kernel_for<T, Momentum::none>(steps, counts);
      case Momentum::first:
        return kernel_for<T, Momentum::first>(steps, counts);
      default:
        return kernel_for<T, Momentum::running>(steps, counts);
    }
  });
}

}  // namespace prox_sgd::cpu::PROX_SGD_SIMD
