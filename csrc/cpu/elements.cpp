// The CPU kernel. On x86 it is compiled for AVX2, where float32 is computed in vectors that are
// written out (avx2.h); the compiler vectorises the rest, as update() has no branches. Elsewhere
// all is left to the compiler.
//
// This object alone is compiled for AVX2: a function that the linker could merge with another
// object's copy of it would run AVX2 on a processor without it. So all that the headers offer is
// always inlined, and the rest is local.
#include "elements.h"

#include <type_traits>

#include "../typed_arrays.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PROX_SGD_AVX2
#include "avx2.h"
#endif

namespace prox_sgd::cpu {
namespace {

// What is known at compile time.
template <MomentumMode kMomentumMode, UpdateForm kUpdateForm, bool kCounted, bool kStart>
struct Variant {
  static constexpr MomentumMode kMode = kMomentumMode;
  static constexpr UpdateForm kForm = kUpdateForm;
  static constexpr bool kCounts = kCounted;
  static constexpr bool kTowardsStart = kStart;
};

// Updates `size` elements one by one and returns the zeros if they are counted. The arrays are
// parameters because GCC believes __restrict only there. `weight` is used with a master only,
// `start` where the step is towards it.
template <typename T, typename V>
inline __attribute__((always_inline)) int64_t update_each(
    const Coefficients<typename T::Compute>& c, typename T::Param* __restrict param,
    const typename T::Grad* __restrict grad, typename T::MomentumBuffer* __restrict momentum_buffer,
    typename T::Weight* __restrict weight, const typename T::Weight* __restrict start,
    int64_t size) {
  using C = typename T::Compute;
  // As wide as the compared type: other widths cost conversions in the vectorised loop.
  std::conditional_t<sizeof(C) == 8, int64_t, int32_t> num_zeros = 0;
  for (int64_t i = 0; i < size; ++i) {
    C p;
    if constexpr (T::has_master) {
      p = load(weight[i]);
    } else {
      p = load(param[i]);
    }
    C m = V::kMode == MomentumMode::running ? load(momentum_buffer[i]) : C(0);
    if constexpr (V::kTowardsStart) {
      update_towards(load(start[i]), c, V::kMode, V::kForm, p, load(grad[i]), m);
    } else {
      update(c, V::kMode, V::kForm, p, load(grad[i]), m);
    }
    if (V::kMode != MomentumMode::none) momentum_buffer[i] = store<typename T::MomentumBuffer>(m);
    if constexpr (T::has_master) weight[i] = store<typename T::Weight>(p);
    // Stored and read back, and counted by a conditional: with a local struct or an added bool, GCC
    // leaves 16-bit loops scalar, nine times slower (tests/gates/instructions.py).
    param[i] = store<typename T::Param>(p);
    if constexpr (V::kCounts && V::kTowardsStart) {
      num_zeros += is_at_start<typename T::Param>(param[i], start[i]) ? 1 : 0;
    } else if constexpr (V::kCounts) {
      num_zeros += is_zero(param[i]) ? 1 : 0;
    }
  }
  return num_zeros;
}

template <typename T, typename V>
inline __attribute__((always_inline)) int64_t
update_each(const Coefficients<typename T::Compute>& c, const TypedArrays<T>& at, int64_t begin,
            int64_t size) {
  // Without momentum the pointer is null, and adding to it is undefined.
  auto* const momentum_buffer =
      V::kMode == MomentumMode::none ? at.momentum_buffer : at.momentum_buffer + begin;
  const auto* const start = V::kTowardsStart ? at.start + begin : nullptr;
  return update_each<T, V>(c, at.param + begin, at.grad + begin, momentum_buffer, at.weight + begin,
                           start, size);
}

// The elements in one cache line of the widest array.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(typename T::Weight);

// How many lines before its use to ask for memory. Bandwidth times latency: Zen 5 is best with 20
// to 64 and Zen 1 with 6 to 12 (bench/README.md); newer processors are given the preference.
constexpr int64_t kPrefetchLines = 32;

// The distance in elements. Opaque to GCC, which would keep a pointer per array for a constant
// distance and spend 6 % more instructions on them.
template <typename T>
inline __attribute__((always_inline)) int64_t prefetch_distance() {
  int64_t elements = kPrefetchLines * kLine<T>;
  asm("" : "+r"(elements));
  return elements;
}

// Prefetches the lines that hold element i, for a single use: hardware prefetchers alone leave a
// sixth of the bandwidth unused (bench/README.md). A prefetch past the end of an array is harmless.
template <typename T, typename V>
inline __attribute__((always_inline)) void prefetch(const TypedArrays<T>& at, int64_t i) {
  __builtin_prefetch(at.param + i, 0, 0);
  __builtin_prefetch(at.grad + i, 0, 0);
  if (V::kMode != MomentumMode::none) __builtin_prefetch(at.momentum_buffer + i, 0, 0);
  if constexpr (T::has_master) __builtin_prefetch(at.weight + i, 0, 0);
  if constexpr (V::kTowardsStart) __builtin_prefetch(at.start + i, 0, 0);
}

#if defined(PROX_SGD_AVX2)

// Updates as many elements from i on as a Floats holds.
template <typename T, typename V>
inline __attribute__((always_inline)) void update_floats(const Coefficients<Floats>& c,
                                                         const TypedArrays<T>& at, int64_t i,
                                                         __m256i& minus_zeros) {
  Floats p = load_floats(at.weight + i);
  Floats m(0.0f);
  if (V::kMode == MomentumMode::running) m = load_floats(at.momentum_buffer + i);
  Floats start(0.0f);
  if constexpr (V::kTowardsStart) {
    start = load_floats(at.start + i);
    update_towards(start, c, V::kMode, V::kForm, p, load_floats(at.grad + i), m);
  } else {
    update(c, V::kMode, V::kForm, p, load_floats(at.grad + i), m);
  }
  if (V::kMode != MomentumMode::none) {
    Stored<typename T::MomentumBuffer>(m).write(at.momentum_buffer + i);
  }
  if constexpr (T::has_master) Stored<typename T::Weight>(p).write(at.weight + i);
  const Stored<typename T::Param> stored(p);
  stored.write(at.param + i);
  if constexpr (V::kCounts && V::kTowardsStart) {
    typename T::Param rounded[Floats::kCount];
    Stored<typename T::Param>(start).write(rounded);
    const Floats at_start = equal(load_floats(at.param + i), load_floats(rounded));
    minus_zeros = _mm256_add_epi32(minus_zeros, minus_true(at_start));
  } else if constexpr (V::kCounts) {
    minus_zeros = _mm256_add_epi32(minus_zeros, stored.minus_zeros());
  }
}

// A range is at most a chunk of the plan, so 32 bits hold its zeros.
template <typename T, typename V>
int64_t update_in_floats(const Coefficients<float>& coefficients, const TypedArrays<T>& at,
                         int64_t begin, int64_t end) {
  const Coefficients<Floats> c = broadcast(coefficients);
  const int64_t ahead = prefetch_distance<T>();
  __m256i minus_zeros = _mm256_setzero_si256();
  int64_t i = begin;
  for (; i + kLine<T> <= end; i += kLine<T>) {
    prefetch<T, V>(at, i + ahead);
    for (int64_t j = 0; j < kLine<T>; j += Floats::kCount) {
      update_floats<T, V>(c, at, i + j, minus_zeros);
    }
  }
  for (; i + Floats::kCount <= end; i += Floats::kCount) {
    update_floats<T, V>(c, at, i, minus_zeros);
  }
  alignas(32) int32_t counts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(counts), minus_zeros);
  int64_t num_zeros = update_each<T, V>(coefficients, at, i, end - i);
  for (const int32_t count : counts) num_zeros -= count;
  return num_zeros;
}

#endif

template <typename T, typename V>
int64_t update_range(const Operands& operands, const void* coefficients, int64_t begin,
                     int64_t end) {
  using C = typename T::Compute;
  const auto c = *static_cast<const Coefficients<C>*>(coefficients);
  const auto at = arrays_from<T>(operands, 0);
#if defined(PROX_SGD_AVX2)
  if constexpr (std::is_same_v<C, float>) return update_in_floats<T, V>(c, at, begin, end);
#endif
  const int64_t ahead = prefetch_distance<T>();
  int64_t num_zeros = 0;
  int64_t i = begin;
  for (; i + kLine<T> <= end; i += kLine<T>) {
    prefetch<T, V>(at, i + ahead);
    num_zeros += update_each<T, V>(c, at, i, kLine<T>);
  }
  return num_zeros + update_each<T, V>(c, at, i, end - i);
}

// A variant that leaves out counting takes an eighth fewer instructions, and a simpler form half of
// them (tests/gates/instructions.py). A first step comes once, and Nesterov's momentum needs a
// buffer: these have no variants of their own. Towards the start only a basic step with momentum
// has some: each variant takes compile time.
template <typename T, MomentumMode kMode, bool kStart>
Kernel kernel_with(UpdateForm form, bool counts) {
  constexpr bool running = kMode == MomentumMode::running;
  if constexpr (running || (kMode == MomentumMode::none && !kStart)) {
    if (form == UpdateForm::basic) {
      return counts ? update_range<T, Variant<kMode, UpdateForm::basic, true, kStart>>
                    : update_range<T, Variant<kMode, UpdateForm::basic, false, kStart>>;
    }
  }
  if constexpr (running && !kStart) {
    if (form == UpdateForm::nesterov) {
      return counts ? update_range<T, Variant<kMode, UpdateForm::nesterov, true, kStart>>
                    : update_range<T, Variant<kMode, UpdateForm::nesterov, false, kStart>>;
    }
  }
  return update_range<T, Variant<kMode, UpdateForm::general, true, kStart>>;
}

template <typename T, bool kStart>
Kernel kernel_of(MomentumMode mode, UpdateForm form, bool counts) {
  switch (mode) {
    case MomentumMode::none:
      return kernel_with<T, MomentumMode::none, kStart>(form, counts);
    case MomentumMode::first_step:
      return kernel_with<T, MomentumMode::first_step, kStart>(form, counts);
    default:
      return kernel_with<T, MomentumMode::running, kStart>(form, counts);
  }
}

}  // namespace

Kernel kernel_for(Storage storage, MomentumMode mode, UpdateForm form, bool counts,
                  bool towards_start) {
  return with_storage(storage, [&](auto tag) {
    using T = TypesOf<decltype(tag)::storage>;
    return towards_start ? kernel_of<T, true>(mode, form, counts)
                         : kernel_of<T, false>(mode, form, counts);
  });
}

}  // namespace prox_sgd::cpu
