// The CUDA kernels of coupled rows: all sets of a launch.
//
// A block takes a piece of a set: some rows of all its members. It updates their elements up to the
// soft threshold and keeps them in shared memory, with their starts where the set has some, adds
// the squares, and stores them scaled. A row that is too long for that is taken in parts, twice:
// once for its squares, and once, computed anew, to be scaled. Nothing is stored before the factors
// are known, but for momentum, which the first pass over a long row leaves alone.
#include "../math/row_factor.h"
#include "device.cuh"
#include "row_spans.cuh"
#include "row_table.h"

namespace prox_sgd::cuda {
namespace {

// A group's options with the values that device memory holds.
template <typename C>
__device__ __forceinline__ GroupNow<C> now(const Group<C>& group) {
  const ScheduledOptions scheduled = scheduled_now(group);
  GroupNow<C> made{group.coefficients, C(1), scheduled.lr < 0.0 ? 0.0 : scheduled.lr};
  set(made.coefficients, scheduled);
  made.ridge = made.coefficients.scale;
  made.coefficients.scale = C(1);
  return made;
}

// What a row is multiplied with, given its sum of squares.
template <typename C>
__device__ __forceinline__ C factor_of(const SetEntry& set, double lr, int64_t row, double sum) {
  const double weight = set.weights == nullptr ? set.weight : set.weights[row];
  return static_cast<C>(row_factor(sum, row_threshold(lr, set.lasso, weight)));
}

// Calls take(member, span, first sum) for the spans of some rows of a set, which all are held.
template <typename T, bool kStart, typename Table, typename Take>
__device__ __forceinline__ void for_each_span(const Table& table, const SetEntry& set,
                                              const Shared<T, kStart>& s, int64_t row, int rows,
                                              Take&& take) {
  constexpr int N = T::per_unit;
  int held_at = 0;
  int units = 0;
  int pairs = 0;
  int first_sum = 0;
#pragma unroll 1
  for (int i = 0; i < set.members; ++i) {
    const MemberEntry& member = table.slots[set.first_member + i].member;
    const int width = static_cast<int>(member.width);
    Span<T> span = span_of<T, kStart>(member, s.groups[member.group].coefficients.mode, row * width,
                                      rows, width);
    span.held_at = held_at;
    span.first_unit = units;
    span.first_pair = pairs;
    take(member, span, first_sum);
    held_at += (span.size() + N - 1) / N * N;
    units += span.units();
    pairs += (span.segments() + 1) / 2;
    first_sum += span.segments();
  }
}

// The step of some rows that a block holds together.
template <typename T, bool kStart, typename Table>
__device__ __forceinline__ void step_piece(const Table& table, const SetEntry& set,
                                           Shared<T, kStart>& s, int64_t first, double lr) {
  using C = typename T::Compute;
  const int rows = static_cast<int>(min(static_cast<int64_t>(set.piece_rows), set.rows - first));
  const auto each = [&](auto&& take) {
    for_each_span<T, kStart>(table, set, s, first, rows, take);
  };
  each([&](const MemberEntry& member, const Span<T>& span, int) {
    update_span(s.groups[member.group].coefficients, span, s, true);
  });
  __syncthreads();
  each([&](const MemberEntry&, const Span<T>& span, int first_sum) {
    add_squares(span, s, first_sum);
  });
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row < rows) {
    double sum = 0.0;
    each([&](const MemberEntry&, const Span<T>& span, int first_sum) {
      sum = add_(sum, with_squares(0.0, span, s, first_sum, row));
    });
    s.factors[row] = factor_of<C>(set, lr, first + row, sum);
  }
  __syncthreads();
  each([&](const MemberEntry& member, const Span<T>& span, int) {
    const int num_zeros = store_span(span, s, s.groups[member.group].ridge);
    if (member.num_zeros) add_to(member.num_zeros, num_zeros);
  });
}

// Calls take(member, span, whether it is the member's last) for the parts of a row that is too long
// to be held, one after the other.
template <typename T, bool kStart, typename Table, typename Take>
__device__ __forceinline__ void for_each_part(const Table& table, const SetEntry& set,
                                              const Shared<T, kStart>& s, int64_t row,
                                              Take&& take) {
  constexpr int kMost = kMostHeld<typename T::Compute>;
#pragma unroll 1
  for (int i = 0; i < set.members; ++i) {
    const MemberEntry& member = table.slots[set.first_member + i].member;
    const int64_t width = member.width;
#pragma unroll 1
    for (int64_t at = 0; at < width; at += kMost) {
      const int size = static_cast<int>(min(width - at, static_cast<int64_t>(kMost)));
      const MomentumMode mode = s.groups[member.group].coefficients.mode;
      take(member, span_of<T, kStart>(member, mode, row * width + at, 1, size), at + size == width);
    }
  }
}

// The step of a row that is too long to be held.
template <typename T, bool kStart, typename Table>
__device__ __forceinline__ void step_long_row(const Table& table, const SetEntry& set,
                                              Shared<T, kStart>& s, int64_t row, double lr) {
  using C = typename T::Compute;
  double sum = 0.0;
  double of_member = 0.0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const auto take = [&](const MemberEntry& member, const Span<T>& span, bool last) {
      const Coefficients<C>& c = s.groups[member.group].coefficients;
      update_span(c, span, s, pass == 1);
      __syncthreads();
      if (pass == 0) {
        add_squares(span, s, 0);
        __syncthreads();
        of_member = with_squares(of_member, span, s, 0, 0);
        if (last) {
          sum = add_(sum, of_member);
          of_member = 0.0;
        }
      } else {
        const int num_zeros = store_span(span, s, s.groups[member.group].ridge);
        if (member.num_zeros) add_to(member.num_zeros, num_zeros);
      }
      __syncthreads();  // the next part overwrites what is held, and the sums
    };
    for_each_part<T, kStart>(table, set, s, row, take);
    if (pass == 0) {
      if (threadIdx.x == 0) s.factors[0] = factor_of<C>(set, lr, row, sum);
      __syncthreads();
    }
  }
}

// The set that a piece belongs to, by binary search: the last that starts at or before it.
template <typename Table>
__device__ __forceinline__ int set_at(const Table& table, int piece) {
  int low = 0;
  int high = table.header.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.slots[middle].set.first_piece <= piece) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename T, bool kStart, typename Table>
__device__ __forceinline__ void step_block(const Table& table) {
  using C = typename T::Compute;
  __shared__ Shared<T, kStart> s;
  const int piece = static_cast<int>(blockIdx.x);
  const SetEntry& set = table.slots[set_at(table, piece)].set;
  // The groups of a set have one learning rate, and one gradient scaler.
  const int group = static_cast<int>(table.slots[set.first_member].member.group);
  const float* const found_inf = table.header.groups[group].values.found_inf;
  if (found_inf && *found_inf != 0.0f) return;
  if (threadIdx.x < kMostGroups) {
    s.groups[threadIdx.x] = now(table.header.groups[threadIdx.x]);
  }
  __syncthreads();
  const double lr = s.groups[group].lr;
  const int64_t number = piece - set.first_piece;
  if (set.piece_rows > 0) {
    step_piece<T, kStart>(table, set, s, number * set.piece_rows, lr);
  } else {
    step_long_row<T, kStart>(table, set, s, number, lr);
  }
}

}  // namespace

template <Storage kStorage, bool kStart>
const void* row_address();

template <Storage kStorage>
using RowTableOf = RowTable<typename TypesOf<kStorage>::Compute>;

// Blocks on an SM. Four of 256 threads leave each thread 64 registers, and three, for packs of
// eight elements, 80. Towards a start, whose values take shared memory too, two fit on an SM of
// compute capability 8.6.
template <Storage kStorage, bool kStart>
constexpr int kBlocks = kStart || TypesOf<kStorage>::per_unit == 8 ? 3 : 4;

#define PROX_SGD_ROW_KERNEL_OF(name, storage, start)                                       \
  extern "C" __global__ void __launch_bounds__(kThreads, kBlocks<Storage::storage, start>) \
      name(const __grid_constant__ RowTableOf<Storage::storage> table) {                   \
    step_block<TypesOf<Storage::storage>, start>(table);                                   \
  }                                                                                        \
  template <>                                                                              \
  const void* row_address<Storage::storage, start>() {                                     \
    return reinterpret_cast<const void*>(&name);                                           \
  }
#define PROX_SGD_ROW_KERNEL(storage)                              \
  PROX_SGD_ROW_KERNEL_OF(prox_sgd_rows_##storage, storage, false) \
  PROX_SGD_ROW_KERNEL_OF(prox_sgd_rows_##storage##_start, storage, true)
PROX_SGD_ROW_KERNEL(float32)
PROX_SGD_ROW_KERNEL(float64)
PROX_SGD_ROW_KERNEL(float16)
PROX_SGD_ROW_KERNEL(bfloat16)
PROX_SGD_ROW_KERNEL(float32_momentum_bfloat16)
PROX_SGD_ROW_KERNEL(bfloat16_master)
PROX_SGD_ROW_KERNEL(bfloat16_master_momentum_bfloat16)
PROX_SGD_ROW_KERNEL(float16_master)
#undef PROX_SGD_ROW_KERNEL
#undef PROX_SGD_ROW_KERNEL_OF

const void* row_kernel_address(Storage storage, bool towards_start, size_t table_bytes) {
  return with_storage(storage, [=](auto tag) -> const void* {
    constexpr Storage kStorage = decltype(tag)::storage;
    if (table_bytes != sizeof(RowTableOf<kStorage>)) return nullptr;
    return towards_start ? row_address<kStorage, true>() : row_address<kStorage, false>();
  });
}

}  // namespace prox_sgd::cuda
