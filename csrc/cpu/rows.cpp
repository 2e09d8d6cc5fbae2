// The CPU kernels of coupled rows. As elements.cpp, this object is compiled for AVX2 on x86: all
// that it defines is local, and it uses no templates of the standard library that the linker could
// merge with another object's.
#include "rows.h"

#include <cstring>
#include <type_traits>

#include "../math/row_factor.h"
#include "../typed_arrays.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PROX_SGD_AVX2
#include "avx2.h"
#endif

namespace prox_sgd::cpu {
namespace {

constexpr int64_t kSegment = 512;
constexpr int64_t kLanes = 16;
constexpr int64_t kPrefetchLines = 32;  // as for elements

// Four numbers in a vector of the compiler's, which splits it where a processor has none so wide.
using Doubles = double __attribute__((vector_size(32)));

// The sums of squares of a segment, lane by lane.
struct Lanes {
  Doubles of[kLanes / 4] = {};

  PROX_SGD_HD double total() const {
    const Doubles four = (of[0] + of[2]) + (of[1] + of[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

template <MomentumMode kMomentumMode, UpdateForm kUpdateForm, bool kStart>
struct Variant {
  static constexpr MomentumMode kMode = kMomentumMode;
  static constexpr UpdateForm kForm = kUpdateForm;
  static constexpr bool kTowardsStart = kStart;
};

// Updates element i and returns the square of it, or of its distance from its start.
template <typename T, typename V>
PROX_SGD_HD double update_one(const Coefficients<typename T::Compute>& c, const TypedArrays<T>& at,
                              typename T::Compute* weights, int64_t i) {
  using C = typename T::Compute;
  C p = load(at.weight[i]);
  C m = V::kMode == MomentumMode::running ? load(at.momentum_buffer[i]) : C(0);
  double wide;
  if constexpr (V::kTowardsStart) {
    const C start = load(at.start[i]);
    update_towards(start, c, V::kMode, V::kForm, p, load(at.grad[i]), m);
    wide = prox_sgd::sub_(p, start);
  } else {
    update(c, V::kMode, V::kForm, p, load(at.grad[i]), m);
    wide = p;
  }
  if (V::kMode != MomentumMode::none) at.momentum_buffer[i] = store<typename T::MomentumBuffer>(m);
  weights[i] = p;
  return wide * wide;
}

// Coefficients in the form that update_sixteen() takes.
template <typename C>
struct Prepared {
  Coefficients<C> each;
  PROX_SGD_HD explicit Prepared(const Coefficients<C>& c) : each(c) {}
};

// Updates elements i to i + 15 and returns the squares, as update_one() does.
template <typename T, typename V>
PROX_SGD_HD Lanes update_sixteen(const Prepared<typename T::Compute>& c, const TypedArrays<T>& at,
                                 typename T::Compute* weights, int64_t i) {
  double squares[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) squares[j] = update_one<T, V>(c.each, at, weights, i + j);
  Lanes lanes;
  memcpy(&lanes, squares, sizeof lanes);
  return lanes;
}

#if defined(PROX_SGD_AVX2)

template <>
struct Prepared<float> {
  Coefficients<float> each;
  Coefficients<Floats> sixteen;
  PROX_SGD_HD explicit Prepared(const Coefficients<float>& c) : each(c), sixteen(broadcast(c)) {}
};

PROX_SGD_HD Doubles square(__m128 x) {
  const __m256d wide = _mm256_cvtps_pd(x);
  return reinterpret_cast<Doubles>(_mm256_mul_pd(wide, wide));
}

template <typename T, typename V,
          typename = std::enable_if_t<std::is_same_v<typename T::Compute, float>>>
PROX_SGD_HD Lanes update_sixteen(const Prepared<float>& c, const TypedArrays<T>& at, float* weights,
                                 int64_t i) {
  Floats p = load_floats(at.weight + i);
  Floats m(0.0f);
  if (V::kMode == MomentumMode::running) m = load_floats(at.momentum_buffer + i);
  Floats distance;
  if constexpr (V::kTowardsStart) {
    const Floats start = load_floats(at.start + i);
    update_towards(start, c.sixteen, V::kMode, V::kForm, p, load_floats(at.grad + i), m);
    distance = sub_(p, start);
  } else {
    update(c.sixteen, V::kMode, V::kForm, p, load_floats(at.grad + i), m);
    distance = p;
  }
  if (V::kMode != MomentumMode::none) {
    Stored<typename T::MomentumBuffer>(m).write(at.momentum_buffer + i);
  }
  Stored<float>(p).write(weights + i);
  return {square(_mm256_castps256_ps128(distance.low)),
          square(_mm256_extractf128_ps(distance.low, 1)),
          square(_mm256_castps256_ps128(distance.high)),
          square(_mm256_extractf128_ps(distance.high, 1))};
}

#endif

template <typename T, typename V>
PROX_SGD_HD void prefetch(const TypedArrays<T>& at, int64_t i) {
  __builtin_prefetch(at.weight + i, 0, 0);
  __builtin_prefetch(at.grad + i, 0, 0);
  if (V::kMode != MomentumMode::none) __builtin_prefetch(at.momentum_buffer + i, 0, 0);
  if constexpr (V::kTowardsStart) __builtin_prefetch(at.start + i, 0, 0);
}

// Updates elements [begin, end), one segment, and returns their sum of squares.
template <typename T, typename V>
PROX_SGD_HD double update_segment(const Prepared<typename T::Compute>& c, const TypedArrays<T>& at,
                                  typename T::Compute* weights, int64_t begin, int64_t end,
                                  int64_t ahead) {
  Lanes lanes;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    prefetch<T, V>(at, i + ahead);
    const Lanes squares = update_sixteen<T, V>(c, at, weights, i);
    for (int64_t n = 0; n < kLanes / 4; ++n) lanes.of[n] += squares.of[n];
  }
  if (i < end) {
    double last[kLanes] = {};  // what is missing counts as 0
    for (int64_t j = 0; i + j < end; ++j) last[j] = update_one<T, V>(c.each, at, weights, i + j);
    Lanes squares;
    memcpy(&squares, last, sizeof squares);
    for (int64_t n = 0; n < kLanes / 4; ++n) lanes.of[n] += squares.of[n];
  }
  return lanes.total();
}

template <typename T, typename V>
void update_rows(const Operands& operands, const void* coefficients, void* to, int64_t rows,
                 int64_t width, double* sums) {
  using C = typename T::Compute;
  const Prepared<C> c(*static_cast<const Coefficients<C>*>(coefficients));
  const auto at = arrays_from<T>(operands, 0);
  C* const weights = static_cast<C*>(to);
  int64_t ahead = kPrefetchLines * 64 / static_cast<int64_t>(sizeof(typename T::Weight));
  asm("" : "+r"(ahead));  // opaque to GCC, as in elements.cpp
  if (width == 1) {       // norms and biases
    int64_t row = 0;
    for (; row + kLanes <= rows; row += kLanes) {
      const Lanes squares = update_sixteen<T, V>(c, at, weights, row);
      double each[kLanes];
      memcpy(each, &squares, sizeof each);
      for (int64_t j = 0; j < kLanes; ++j) sums[row + j] += each[j];
    }
    for (; row < rows; ++row) sums[row] += update_one<T, V>(c.each, at, weights, row);
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0.0;
    const int64_t end = (row + 1) * width;
    for (int64_t begin = row * width; begin < end; begin += kSegment) {
      const int64_t stop = begin + kSegment < end ? begin + kSegment : end;
      sum += update_segment<T, V>(c, at, weights, begin, stop, ahead);
    }
    sums[row] += sum;
  }
}

// Scales rows of parameters of type P in the compute type C, or their distances from starts of type
// W; void: there are none.
template <typename P, typename C, typename W>
int64_t scale(const Operands& at, void* weights, int64_t rows, int64_t width, const double* factors,
              double ridge, bool counts) {
  constexpr bool kStart = !std::is_void_v<W>;
  const C r = static_cast<C>(ridge);
  const bool in_place = at.param == weights;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    C* const w = static_cast<C*>(weights) + row * width;
    P* const p = static_cast<P*>(at.param) + row * width;
    [[maybe_unused]] const W* start = static_cast<const W*>(at.start);
    if constexpr (kStart) start += row * width;
    const C factor = static_cast<C>(factors[row]);
    if (!kStart && factor == C(0)) {
      memset(w, 0, static_cast<size_t>(width) * sizeof(C));
    } else if (factor != C(1) || r != C(1)) {
      for (int64_t i = 0; i < width; ++i) {
        if constexpr (kStart) {
          const C from = load(start[i]);
          w[i] = prox_sgd::scale_towards(from, scale_row_towards(from, w[i], factor), r);
        } else {
          w[i] = prox_sgd::mul_(prox_sgd::mul_(w[i], factor), r);
        }
      }
    }
    if (!in_place) {
      for (int64_t i = 0; i < width; ++i) p[i] = store<P>(w[i]);
    }
    if (counts) {
      for (int64_t i = 0; i < width; ++i) {
        if constexpr (kStart) {
          count += is_at_start<P>(p[i], start[i]) ? 1 : 0;
        } else {
          count += is_zero(p[i]) ? 1 : 0;
        }
      }
    }
  }
  return count;
}

// Towards the start only a basic step with momentum has a variant beside the general ones.
template <typename T>
auto update_towards_start_for(MomentumMode mode, UpdateForm form) -> decltype(RowKernels::update) {
  constexpr auto kGeneral = UpdateForm::general;
  constexpr auto kRunning = MomentumMode::running;
  if (mode == MomentumMode::first_step) {
    return update_rows<T, Variant<MomentumMode::first_step, kGeneral, true>>;
  }
  if (mode == MomentumMode::none) {
    return update_rows<T, Variant<MomentumMode::none, kGeneral, true>>;
  }
  if constexpr (sizeof(typename T::Param) > 2) {
    if (form == UpdateForm::basic) {
      return update_rows<T, Variant<kRunning, UpdateForm::basic, true>>;
    }
  }
  return update_rows<T, Variant<kRunning, kGeneral, true>>;
}

// The variants of elements.cpp, for its reasons; of 16-bit parameters only the general one, as each
// takes long to compile.
template <typename T>
auto update_for(MomentumMode mode, UpdateForm form) -> decltype(RowKernels::update) {
  constexpr auto kNone = MomentumMode::none;
  constexpr auto kRunning = MomentumMode::running;
  if (mode == MomentumMode::first_step) {
    return update_rows<T, Variant<MomentumMode::first_step, UpdateForm::general, false>>;
  }
  if constexpr (sizeof(typename T::Param) > 2) {
    if (form == UpdateForm::basic) {
      return mode == kNone ? update_rows<T, Variant<kNone, UpdateForm::basic, false>>
                           : update_rows<T, Variant<kRunning, UpdateForm::basic, false>>;
    }
    if (form == UpdateForm::nesterov) {
      return update_rows<T, Variant<kRunning, UpdateForm::nesterov, false>>;
    }
  }
  return mode == kNone ? update_rows<T, Variant<kNone, UpdateForm::general, false>>
                       : update_rows<T, Variant<kRunning, UpdateForm::general, false>>;
}

}  // namespace

RowKernels row_kernels_for(Storage storage, MomentumMode mode, UpdateForm form,
                           bool towards_start) {
  return with_storage(storage, [=](auto tag) {
    using T = TypesOf<decltype(tag)::storage>;
    using P = typename T::Param;
    using C = typename T::Compute;
    using W = typename T::Weight;
    const auto update =
        towards_start ? update_towards_start_for<T>(mode, form) : update_for<T>(mode, form);
    const auto scale_rows = towards_start ? scale<P, C, W> : scale<P, C, void>;
    return RowKernels{
        update,    scale_rows,           sizeof(P), sizeof(typename T::MomentumBuffer), sizeof(C),
        sizeof(W), sizeof(W) < sizeof(C)};
  });
}

}  // namespace prox_sgd::cpu
