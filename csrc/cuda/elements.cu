// The CUDA kernels: all parameters of a launch in one pass over memory.
//
// The parameters lie end to end in units of 16 bytes of their widest type (params.h), and each
// block takes kUnitsPerBlock units of that line, whatever parameters they belong to: all blocks but
// the last have the same work. A thread moves whole units where all addresses of a parameter are
// aligned, and otherwise, as in a last unit that isn't full, single elements, coalesced.
#include "../math/update.h"
#include "../typed_arrays.h"
#include "packs.cuh"
#include "params.h"

namespace prox_sgd::cuda {
namespace {

// Updates kCount packs of N elements, `stride` elements apart, and returns how many are zero
// afterwards. All loads come before the first use. Offsets within a block's range fit in 32 bits;
// addresses and sizes are 64-bit.
template <typename T, bool kStart, int N, int kCount>
__device__ __forceinline__ int update_packs(const Coefficients<typename T::Compute>& c,
                                            const TypedArrays<T>& t, int at, int stride) {
  using C = typename T::Compute;
  Pack<typename T::Weight, N> p[kCount];
  Pack<typename T::Grad, N> g[kCount];
  Pack<typename T::MomentumBuffer, N> m[kCount] = {};
  Pack<typename T::Weight, N> start[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    read(t.weight + at + k * stride, p[k]);
    read(t.grad + at + k * stride, g[k]);
    if constexpr (kStart) read(t.start + at + k * stride, start[k]);
  }
  if (c.mode == MomentumMode::running) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) read(t.momentum_buffer + at + k * stride, m[k]);
  }
  int num_zeros = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    Pack<typename T::Param, N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      C pi = load(p[k].values[i]);
      C mi = load(m[k].values[i]);
      const C gi = load(g[k].values[i]);
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
    write(t.param + at + k * stride, stored);
    if constexpr (T::has_master) write(t.weight + at + k * stride, p[k]);
    if (c.mode != MomentumMode::none) write(t.momentum_buffer + at + k * stride, m[k]);
  }
  return num_zeros;
}

// How many packs of each tensor a thread loads before it computes. One where the elements of a pack
// need more registers in the compute type; parameter, gradient and momentum buffer are then still
// three loads in flight.
template <typename T>
constexpr int loads_in_flight = sizeof(typename T::Weight) == sizeof(float) ? 2 : 1;

// Updates elements [begin, end) in packs of N, by all threads of the block; N divides end - begin.
// Returns how many of this thread's elements are zero afterwards.
template <typename T, bool kStart, int N>
__device__ __forceinline__ int update_range(const Coefficients<typename T::Compute>& c,
                                            const TypedArrays<T>& arrays, int begin, int end) {
  constexpr int kStride = kThreads * N;
  constexpr int kCount = loads_in_flight<T>;
  int num_zeros = 0;
  int at = begin + static_cast<int>(threadIdx.x) * N;
  for (; at + (kCount - 1) * kStride < end; at += kCount * kStride) {
    num_zeros += update_packs<T, kStart, N, kCount>(c, arrays, at, kStride);
  }
  if (kCount == 2 && at < end) num_zeros += update_packs<T, kStart, N, 1>(c, arrays, at, kStride);
  return num_zeros;
}

// Adds every thread's number to a counter, with one atomic addition per warp. All threads of the
// block must call it.
__device__ __forceinline__ void add_to(int64_t* counter, int number) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, distance);
  }
  if (threadIdx.x % 32 == 0 && number != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter),
              static_cast<unsigned long long>(number));
  }
}

// The entry that a unit belongs to, by binary search: the last that starts at or before it.
template <typename C>
__device__ __forceinline__ int64_t entry_at(const Parameters<C>& parameters, int64_t unit) {
  int64_t low = 0;
  int64_t high = parameters.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (parameters.entries[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The coefficients with the values that device memory holds.
template <typename C>
__device__ __forceinline__ Coefficients<C> coefficients_now(const Parameters<C>& parameters) {
  Coefficients<C> c = parameters.coefficients;
  if (parameters.reads_device) {
    const DeviceValues& from = parameters.values;
    ScheduledOptions scheduled = parameters.scheduled;
    if (from.lr) scheduled.lr = *from.lr;
    if (from.l1) scheduled.l1 = *from.l1;
    if (from.grad_scale) scheduled.grad_scale = *from.grad_scale;
    if (from.grad_coefficient) scheduled.grad_coefficient = *from.grad_coefficient;
    set(c, scheduled);
  }
  return c;
}

template <typename T, bool kStart>
__device__ __forceinline__ void update_block(const Parameters<typename T::Compute>& parameters) {
  constexpr int N = T::per_unit;
  if (parameters.values.found_inf && *parameters.values.found_inf != 0.0f) return;
  const auto c = coefficients_now(parameters);
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kUnitsPerBlock;
  const int64_t stop = min(unit + kUnitsPerBlock, parameters.units);
  for (int64_t index = entry_at(parameters, unit); unit < stop; ++index) {
    const Entry& entry = parameters.entries[index];
    const Operands& o = entry.operands;
    const int64_t entry_units = (o.numel + N - 1) / N;
    const int64_t next = min(entry.first_unit + entry_units, stop);
    const int64_t begin = (unit - entry.first_unit) * N;
    const int64_t end = min((next - entry.first_unit) * N, o.numel);
    const auto arrays = arrays_from<T>(o, begin);
    const int size = static_cast<int>(end - begin);
    const bool vectors = aligned<N>(arrays.param) && aligned<N>(arrays.grad) &&
                         aligned<N>(arrays.momentum_buffer) && aligned<N>(arrays.weight) &&
                         (!kStart || aligned<N>(arrays.start));
    const int in_vectors = vectors ? size / N * N : 0;
    int num_zeros = update_range<T, kStart, N>(c, arrays, 0, in_vectors);
    num_zeros += update_range<T, kStart, 1>(c, arrays, in_vectors, size);
    if (o.num_zeros) add_to(o.num_zeros, num_zeros);
    unit = next;
  }
}

}  // namespace

template <Storage kStorage, bool kStart>
const void* address();

// Four blocks of 256 threads on an SM leave each thread 64 registers.
#define PROX_SGD_KERNEL(name, storage, start)                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 4)                                \
      name(const __grid_constant__ Parameters<typename TypesOf<Storage::storage>::Compute> \
               parameters) {                                                               \
    update_block<TypesOf<Storage::storage>, start>(parameters);                            \
  }                                                                                        \
  template <>                                                                              \
  const void* address<Storage::storage, start>() {                                         \
    return reinterpret_cast<const void*>(&name);                                           \
  }
#define PROX_SGD_KERNELS(storage)                     \
  PROX_SGD_KERNEL(prox_sgd_##storage, storage, false) \
  PROX_SGD_KERNEL(prox_sgd_##storage##_start, storage, true)
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

const void* kernel_address(Storage storage, bool towards_start) {
  return with_storage(storage, [towards_start](auto tag) {
    constexpr Storage kStorage = decltype(tag)::storage;
    return towards_start ? address<kStorage, true>() : address<kStorage, false>();
  });
}

size_t parameter_bytes(Storage storage) {
  return with_storage(storage, [](auto tag) {
    return sizeof(Parameters<typename TypesOf<decltype(tag)::storage>::Compute>);
  });
}

}  // namespace prox_sgd::cuda
