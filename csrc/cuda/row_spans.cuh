// Spans of coupled rows: what a block holds of one parameter in shared memory, and what its threads
// do with it.
#pragma once

#include <type_traits>

#include "../math/row_factor.h"
#include "../typed_arrays.h"
#include "packs.cuh"
#include "row_table.h"

namespace prox_sgd::cuda {

// A group's options as a block uses them.
template <typename C>
struct GroupNow {
  Coefficients<C> coefficients;  // without the ridge factor, which comes after the group's
  C ridge;
  double lr;
};

// What a block shares. `starts` are of what is held; towards zero there are none.
template <typename T, bool kStart>
struct Shared {
  using C = typename T::Compute;
  alignas(16) C held[kMostHeld<C>];
  alignas(16) typename T::Weight starts[kStart ? kMostHeld<C> : 1];
  double sums[kMostSums];  // of the squares of a segment
  C factors[kThreads];     // of rows
  GroupNow<C> groups[kMostGroups];

  // What element i adds to its row's norm: it, or its distance from its start.
  __device__ __forceinline__ C distance(int i) const {
    if constexpr (kStart) return sub_(held[i], load(starts[i]));
    return held[i];
  }
};

// Rows of one member that a block holds, or a part of one row.
template <typename T>
struct Span {
  TypedArrays<T> arrays;  // from its first element on
  int rows;
  int width;
  int held_at;     // where it is in shared memory
  int first_unit;  // units, and pairs of segments, that come before it: threads take turns
  int first_pair;
  bool vectors;  // whether addresses are aligned

  __device__ int size() const { return rows * width; }
  __device__ int in_vectors() const { return vectors ? size() / T::per_unit * T::per_unit : 0; }
  __device__ int units() const { return in_vectors() / T::per_unit + size() - in_vectors(); }
  __device__ int segments_of_a_row() const { return (width + kSegment - 1) / kSegment; }
  // Squares of one element are its row's.
  __device__ int segments() const { return width == 1 ? 0 : rows * segments_of_a_row(); }
};

template <typename T, bool kStart>
__device__ __forceinline__ Span<T> span_of(const MemberEntry& member, MomentumMode mode,
                                           int64_t begin, int rows, int width) {
  constexpr int N = T::per_unit;
  Operands operands{};
  operands.param = member.param;
  operands.grad = member.grad;
  operands.momentum_buffer = member.momentum_buffer;
  operands.master_param = member.master_param;
  operands.start = kStart ? member.start : nullptr;
  Span<T> span{arrays_from<T>(operands, begin), rows, width, 0, 0, 0, false};
  span.vectors = aligned<N>(span.arrays.param) && aligned<N>(span.arrays.grad) &&
                 aligned<N>(span.arrays.weight) && (!kStart || aligned<N>(span.arrays.start)) &&
                 (mode == MomentumMode::none || aligned<N>(span.arrays.momentum_buffer));
  return span;
}

// Calls take(number of elements, first element) for each unit of a span that is this thread's: a
// vector, or a single element. The same thread takes the same unit each time.
template <typename T, typename Take>
__device__ __forceinline__ void for_each_unit(const Span<T>& span, Take&& take) {
  constexpr int N = T::per_unit;
  const int in_vectors = span.in_vectors();
  const int units = span.units();
  const int vectors = in_vectors / N;
#pragma unroll 1
  for (int unit = (static_cast<int>(threadIdx.x) - span.first_unit) & (kThreads - 1); unit < units;
       unit += kThreads) {
    if (unit < vectors) {
      take(std::integral_constant<int, N>(), unit * N);
    } else {
      take(std::integral_constant<int, 1>(), in_vectors + unit - vectors);
    }
  }
}

// Writes N values to shared memory, 16 bytes at a time where they are a vector.
template <int N, typename C>
__device__ __forceinline__ void hold(C* to, const C (&values)[N]) {
  if constexpr (N == 1) {
    *to = values[0];
  } else {
    constexpr int kWide = 16 / sizeof(C);
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      Pack<C, kWide> pack;
#pragma unroll
      for (int j = 0; j < kWide; ++j) pack.values[j] = values[i + j];
      *reinterpret_cast<uint4*>(to + i) = bit_cast<uint4>(pack);
    }
  }
}

// Updates a span's elements up to the soft threshold, into shared memory.
template <typename T, bool kStart>
__device__ __forceinline__ void update_span(const Coefficients<typename T::Compute>& c,
                                            const Span<T>& span, Shared<T, kStart>& s,
                                            bool stores_momentum) {
  using C = typename T::Compute;
  for_each_unit(span, [&](auto size, int at) {
    constexpr int N = decltype(size)::value;
    const TypedArrays<T>& t = span.arrays;
    Pack<typename T::Weight, N> p;
    Pack<typename T::Grad, N> g;
    Pack<typename T::MomentumBuffer, N> m{};
    Pack<typename T::Weight, N> start{};
    read<Use::again>(t.weight + at, p);
    read<Use::once>(t.grad + at, g);
    if (kStart && t.start) read<Use::once>(t.start + at, start);
    if (c.mode == MomentumMode::running) read<Use::once>(t.momentum_buffer + at, m);
    C values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      C mi = load(m.values[i]);
      values[i] = load(p.values[i]);
      if constexpr (kStart) {
        update_towards(load(start.values[i]), c, c.mode, UpdateForm::general, values[i],
                       load(g.values[i]), mi);
      } else {
        update(c, c.mode, UpdateForm::general, values[i], load(g.values[i]), mi);
      }
      m.values[i] = store<typename T::MomentumBuffer>(mi);
    }
    hold<N>(s.held + span.held_at + at, values);
    if constexpr (kStart) hold<N>(s.starts + span.held_at + at, start.values);
    if (stores_momentum && c.mode != MomentumMode::none) {
      write<Use::once>(t.momentum_buffer + at, m);
    }
  });
}

// Scales a span's elements by their rows' factors and stores them. Returns how many of this
// thread's are zero, or at their start.
template <typename T, bool kStart>
__device__ __forceinline__ int store_span(const Span<T>& span, const Shared<T, kStart>& s,
                                          typename T::Compute ridge) {
  using C = typename T::Compute;
  int num_zeros = 0;
  for_each_unit(span, [&](auto size, int at) {
    constexpr int N = decltype(size)::value;
    Pack<typename T::Param, N> stored;
    Pack<typename T::Weight, N> weight;
    int row = at / span.width;
    int left = (row + 1) * span.width - at;  // of the row
    const int from = span.held_at + at;
    const C* const held = s.held + from;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const C factor = s.factors[row];
      C value;
      if constexpr (kStart) {
        const C start = load(s.starts[from + i]);
        value = scale_towards(start, scale_row_towards(start, held[i], factor), ridge);
      } else {
        const C scaled = mul_(mul_(held[i], factor), ridge);
        value = factor == C(0) ? C(0) : scaled;
      }
      stored.values[i] = store<typename T::Param>(value);
      weight.values[i] = store<typename T::Weight>(value);
      if constexpr (kStart) {
        num_zeros += is_at_start(stored.values[i], s.starts[from + i]);
      } else {
        num_zeros += is_zero(stored.values[i]);
      }
      if (--left == 0) {
        ++row;
        left = span.width;
      }
    }
    write<Use::again>(span.arrays.param + at, stored);
    if constexpr (T::has_master) write<Use::once>(span.arrays.weight + at, weight);
  });
  return num_zeros;
}

// A sum with the square of one more element. That of a float is exact in float64.
__device__ __forceinline__ double with_square(double sum, float x) {
  const double wide = x;
  return fma_(wide, wide, sum);
}
__device__ __forceinline__ double with_square(double sum, double x) {
  return add_(sum, mul_(x, x));
}

// Adds the squares of each segment of a span. Half a warp takes a segment, each thread a lane.
template <typename T, bool kStart>
__device__ __forceinline__ void add_squares(const Span<T>& span, Shared<T, kStart>& s,
                                            int first_sum) {
  constexpr int kWarps = kThreads / 32;
  const int segments = span.segments();
  const int of_a_row = span.segments_of_a_row();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int half = static_cast<int>(threadIdx.x) / kLanes % 2;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int pair = (warp - span.first_pair) & (kWarps - 1); 2 * pair < segments; pair += kWarps) {
    const int segment = 2 * pair + half;
    double sum = 0.0;
    if (segment < segments) {
      const int row = segment / of_a_row;
      const int begin = segment % of_a_row * kSegment;
      const int end = min(begin + kSegment, span.width);
      const int from = span.held_at + row * span.width;
#pragma unroll 4
      for (int i = begin + lane; i < end; i += kLanes) sum = with_square(sum, s.distance(from + i));
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sum = add_(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
    }
    if (segment < segments && lane == 0) s.sums[first_sum + segment] = sum;
  }
}

// A row's sum with its squares in a span added, segment after segment.
template <typename T, bool kStart>
__device__ __forceinline__ double with_squares(double sum, const Span<T>& span,
                                               const Shared<T, kStart>& s, int first_sum, int row) {
  if (span.width == 1) return with_square(sum, s.distance(span.held_at + row));
  const int count = span.segments_of_a_row();
#pragma unroll 1
  for (int i = 0; i < count; ++i) sum = add_(sum, s.sums[first_sum + row * count + i]);
  return sum;
}

}  // namespace prox_sgd::cuda
