// The CUDA kernels: all parameters of a launch in one pass over memory.
//
// The parameters lie in a line of units of 16 bytes of their widest type (params.h), and each block
// takes kUnitsPerBlock units of that line, whatever parameters they belong to. A thread moves whole
// units where the addresses are aligned, and otherwise, as in a last unit that isn't full, single
// elements, coalesced.
#include "../math/update.h"
#include "../typed_arrays.h"
#include "device.cuh"
#include "packs.cuh"
#include "params.h"

namespace prox_sgd::cuda {
namespace {

// Updates kCount packs of N elements, `stride` elements apart, and returns how many are zero
// afterwards. All loads come before the first use. Offsets within a block's range fit in 32 bits;
// addresses and sizes are 64-bit. kGrad: how many elements of a gradient its alignment lets a load
// move, N or 1.
template <typename T, bool kStart, int N, int kGrad, int kCount>
__device__ __forceinline__ int update_packs(const Coefficients<typename T::Compute>& c,
                                            const TypedArrays<T>& t, int at, int stride) {
  using C = typename T::Compute;
  Pack<typename T::Weight, N> p[kCount];
  Pack<typename T::Grad, kGrad> g[kCount][N / kGrad];
  Pack<typename T::MomentumBuffer, N> m[kCount] = {};
  Pack<typename T::Weight, N> start[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    read<Use::again>(t.weight + at + k * stride, p[k]);
#pragma unroll
    for (int i = 0; i < N; i += kGrad) {
      read<Use::once>(t.grad + at + k * stride + i, g[k][i / kGrad]);
    }
    if constexpr (kStart) read<Use::once>(t.start + at + k * stride, start[k]);
  }
  if (c.mode == MomentumMode::running) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) read<Use::once>(t.momentum_buffer + at + k * stride, m[k]);
  }
  int num_zeros = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    Pack<typename T::Param, N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      C pi = load(p[k].values[i]);
      C mi = load(m[k].values[i]);
      const C gi = load(g[k][i / kGrad].values[i % kGrad]);
      if constexpr (kStart) {
        update_towards(load(start[k].values[i]), c, c.mode, UpdateForm::general, pi, gi, mi);
      } else {
        update(c, c.mode, UpdateForm::general, pi, gi, mi);
      }
      p[k].values[i] = store<typename T::Weight>(pi);
      m[k].values[i] = store<typename T::MomentumBuffer>(mi);
      stored.values[i] = store<typename T::Param>(pi);
      if constexpr (kStart) {
        num_zeros += is_at_start(stored.values[i], start[k].values[i]);
      } else {
        num_zeros += is_zero(stored.values[i]);
      }
    }
    write<Use::again>(t.param + at + k * stride, stored);
    if constexpr (T::has_master) write<Use::once>(t.weight + at + k * stride, p[k]);
    if (c.mode != MomentumMode::none) write<Use::once>(t.momentum_buffer + at + k * stride, m[k]);
  }
  return num_zeros;
}

// How many packs of each tensor a thread loads before it computes. One where the elements of a pack
// need more registers in the compute type, and towards a start; three or four loads are then still
// in flight.
template <typename T, bool kStart>
constexpr int loads_in_flight = sizeof(typename T::Weight) == sizeof(float) && !kStart ? 2 : 1;

// Updates elements [begin, end) in packs of N, by all threads of the block; N divides end - begin.
// Returns how many of this thread's elements are zero afterwards.
template <typename T, bool kStart, int N, int kGrad>
__device__ __forceinline__ int update_range(const Coefficients<typename T::Compute>& c,
                                            const TypedArrays<T>& arrays, int begin, int end) {
  constexpr int kStride = kThreads * N;
  constexpr int kCount = loads_in_flight<T, kStart>;
  int num_zeros = 0;
  int at = begin + static_cast<int>(threadIdx.x) * N;
#pragma unroll 1
  for (; at + (kCount - 1) * kStride < end; at += kCount * kStride) {
    num_zeros += update_packs<T, kStart, N, kGrad, kCount>(c, arrays, at, kStride);
  }
  if (kCount == 2 && at < end) {
    num_zeros += update_packs<T, kStart, N, kGrad, 1>(c, arrays, at, kStride);
  }
  return num_zeros;
}

// The entry that a unit belongs to, by binary search: the last that starts at or before it.
template <typename Table>
__device__ __forceinline__ int entry_at(const Table& table, int64_t unit) {
  int low = 0;
  int high = table.header.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entries[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A group's coefficients with the values that device memory holds. One thread computes them, as
// most GPUs are slow in float64. All threads of the block must call it.
template <typename C>
__device__ __forceinline__ Coefficients<C> coefficients_now(const Group<C>& group) {
  if (!group.reads_device) return group.coefficients;
  __shared__ Coefficients<C> now;
  __syncthreads();  // nobody reads the last call's any more
  if (threadIdx.x == 0) {
    now = group.coefficients;
    set(now, scheduled_now(group));
  }
  __syncthreads();
  return now;
}

template <typename T, bool kStart, typename Table>
__device__ __forceinline__ void update_block(const Table& table) {
  constexpr int N = T::per_unit;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUnitsPerBlock;
  const int64_t stop = first + kUnitsPerBlock;
  for (int index = entry_at(table, first); index < table.header.count; ++index) {
    const Entry& entry = table.entries[index];
    if (entry.first_unit >= stop) break;
    const auto& group = table.header.groups[entry.group];
    if (group.values.found_inf && *group.values.found_inf != 0.0f) continue;
    const auto c = coefficients_now(group);
    const Operands& o = entry.operands;
    const int64_t begin = max(first - entry.first_unit, int64_t{0}) * N;
    const int64_t end = min((stop - entry.first_unit) * N, o.numel);
    const auto arrays = arrays_from<T>(o, begin);
    const int size = static_cast<int>(end - begin);
    // Towards a start no registers are left for loads of single gradients beside vectors.
    const bool vectors = aligned<N>(arrays.param) && aligned<N>(arrays.momentum_buffer) &&
                         aligned<N>(arrays.weight) &&
                         (!kStart || (aligned<N>(arrays.start) && aligned<N>(arrays.grad)));
    const int in_vectors = vectors ? size / N * N : 0;
    int num_zeros;
    if (kStart || aligned<N>(arrays.grad)) {
      num_zeros = update_range<T, kStart, N, N>(c, arrays, 0, in_vectors);
    } else {
      num_zeros = update_range<T, kStart, N, 1>(c, arrays, 0, in_vectors);
    }
    num_zeros += update_range<T, kStart, 1, 1>(c, arrays, in_vectors, size);
    if (o.num_zeros) add_to(o.num_zeros, num_zeros);
  }
}

}  // namespace

template <Storage kStorage, bool kStart, int kBytes>
const void* address();

template <Storage kStorage, int kBytes>
using TableOf = Table<typename TypesOf<kStorage>::Compute, kBytes>;

// Four blocks of 256 threads on an SM leave each thread 64 registers, and three, towards a
// start, 80.
#define PROX_SGD_KERNEL(name, storage, start, bytes)                         \
  extern "C" __global__ void __launch_bounds__(kThreads, start ? 3 : 4)      \
      name(const __grid_constant__ TableOf<Storage::storage, bytes> table) { \
    update_block<TypesOf<Storage::storage>, start>(table);                   \
  }                                                                          \
  template <>                                                                \
  const void* address<Storage::storage, start, bytes>() {                    \
    return reinterpret_cast<const void*>(&name);                             \
  }
#if PROX_SGD_PARAMETER_BYTES > 4096
#define PROX_SGD_KERNELS(storage)                                        \
  PROX_SGD_KERNEL(prox_sgd_##storage##_12k, storage, false, kSmallTable) \
  PROX_SGD_KERNEL(prox_sgd_##storage##_32k, storage, false, kLargeTable) \
  PROX_SGD_KERNEL(prox_sgd_##storage##_start_12k, storage, true, kSmallTable)
#else
#define PROX_SGD_KERNELS(storage)                                       \
  PROX_SGD_KERNEL(prox_sgd_##storage##_4k, storage, false, kSmallTable) \
  PROX_SGD_KERNEL(prox_sgd_##storage##_start_4k, storage, true, kSmallTable)
#endif
PROX_SGD_KERNELS(float32)
PROX_SGD_KERNELS(float64)
PROX_SGD_KERNELS(float16)
PROX_SGD_KERNELS(bfloat16)
PROX_SGD_KERNELS(float32_momentum_bfloat16)
PROX_SGD_KERNELS(bfloat16_master)
PROX_SGD_KERNELS(bfloat16_master_momentum_bfloat16)
PROX_SGD_KERNELS(float16_master)
#undef PROX_SGD_KERNELS
#undef PROX_SGD_KERNEL

const void* kernel_address(Storage storage, bool towards_start, size_t table_bytes) {
  return with_storage(storage, [=](auto tag) -> const void* {
    constexpr Storage kStorage = decltype(tag)::storage;
    if (table_bytes == sizeof(TableOf<kStorage, kSmallTable>)) {
      return towards_start ? address<kStorage, true, kSmallTable>()
                           : address<kStorage, false, kSmallTable>();
    }
    if (!towards_start && table_bytes == sizeof(TableOf<kStorage, kLargeTable>)) {
      return address<kStorage, false, kLargeTable>();
    }
    return nullptr;
  });
}

}  // namespace prox_sgd::cuda
