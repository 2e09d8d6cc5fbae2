// The CUDA kernel: every tensor of a bucket in one launch, one pass over memory.
//
// The bucket's tensors lie end to end in units of 16 bytes, and each block takes kUnitsPerBlock
// units of that line, whatever tensors they belong to: all blocks but the last have the same work.
// Within a tensor whose three addresses are aligned, a thread moves whole units; where they are
// not, and in the last unit of a tensor that does not fill it, single elements, neighbours by
// neighbours.
#include "kernel.h"

namespace prox_sgd::cuda {
namespace {

// N elements that are moved in one access: a whole unit, or a single element. __stwb is the plain
// store, spelled so that nvcc doesn't cut a vector into its elements, as it does with an
// assignment.
template <typename T, int N>
struct Pack {
  T values[N];
};

template <typename T>
__device__ __forceinline__ void read(const T* from, Pack<T, 1>& pack) {
  pack.values[0] = *from;
}

template <typename T>
__device__ __forceinline__ void write(T* to, const Pack<T, 1>& pack) {
  *to = pack.values[0];
}

__device__ __forceinline__ void read(const float* from, Pack<float, 4>& pack) {
  const float4 word = *reinterpret_cast<const float4*>(from);
  pack = {word.x, word.y, word.z, word.w};
}

__device__ __forceinline__ void write(float* to, const Pack<float, 4>& pack) {
  const float* v = pack.values;
  __stwb(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
}

__device__ __forceinline__ void read(const double* from, Pack<double, 2>& pack) {
  const double2 word = *reinterpret_cast<const double2*>(from);
  pack = {word.x, word.y};
}

__device__ __forceinline__ void write(double* to, const Pack<double, 2>& pack) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(pack.values[0], pack.values[1]));
}

// Two 16-bit elements in a 32-bit word, the first in the lower half.
template <typename T>
__device__ __forceinline__ void split(uint32_t word, T& low, T& high) {
  low.bits = static_cast<uint16_t>(word);
  high.bits = static_cast<uint16_t>(word >> 16);
}

template <typename T>
__device__ __forceinline__ uint32_t join(T low, T high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <typename T>
__device__ __forceinline__ void read(const T* from, Pack<T, 8>& pack) {
  const uint4 word = *reinterpret_cast<const uint4*>(from);
  T* v = pack.values;
  split(word.x, v[0], v[1]);
  split(word.y, v[2], v[3]);
  split(word.z, v[4], v[5]);
  split(word.w, v[6], v[7]);
}

template <typename T>
__device__ __forceinline__ void write(T* to, const Pack<T, 8>& pack) {
  const T* v = pack.values;
  __stwb(reinterpret_cast<uint4*>(to),
         make_uint4(join(v[0], v[1]), join(v[2], v[3]), join(v[4], v[5]), join(v[6], v[7])));
}

// The piece of a tensor triple that a block works on. A block's piece is short, so that offsets in
// it are 32-bit while addresses and sizes are 64-bit.
template <typename T>
struct Piece {
  T* param;
  const T* grad;
  T* momentum;
};

// Updates kCount packs of N elements, `stride` elements apart. All loads come before the first use.
template <typename T, int N, int kCount>
__device__ __forceinline__ void update_packs(const Coefficients<compute_t<T>>& c, const Piece<T>& t,
                                             int at, int stride) {
  Pack<T, N> p[kCount];
  Pack<T, N> g[kCount];
  Pack<T, N> m[kCount] = {};
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    read(t.param + at + k * stride, p[k]);
    read(t.grad + at + k * stride, g[k]);
  }
  if (c.mode == Momentum::running) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) read(t.momentum + at + k * stride, m[k]);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      compute_t<T> pi = load(p[k].values[i]);
      compute_t<T> mi = load(m[k].values[i]);
      update(c, c.mode, pi, load(g[k].values[i]), mi);
      p[k].values[i] = store<T>(pi);
      m[k].values[i] = store<T>(mi);
    }
    write(t.param + at + k * stride, p[k]);
    if (c.mode != Momentum::none) write(t.momentum + at + k * stride, m[k]);
  }
}

// Packs of each tensor that a thread reads before it computes: what its 40 registers hold. That is
// one where computing needs more registers than a float32 a word; parameter, gradient and momentum
// then still are three loads in flight.
template <typename T>
constexpr int loads_in_flight = sizeof(T) == sizeof(float) ? 2 : 1;

// Elements [begin, end) of the piece in packs of N, by all threads of the block; N divides
// end - begin.
template <typename T, int N>
__device__ __forceinline__ void update_range(const Coefficients<compute_t<T>>& c,
                                             const Piece<T>& piece, int begin, int end) {
  constexpr int kStride = kThreads * N;
  constexpr int kCount = loads_in_flight<T>;
  int at = begin + static_cast<int>(threadIdx.x) * N;
  for (; at + (kCount - 1) * kStride < end; at += kCount * kStride) {
    update_packs<T, N, kCount>(c, piece, at, kStride);
  }
  if (kCount == 2 && at < end) update_packs<T, N, 1>(c, piece, at, kStride);
}

// The entry that holds a unit: the last one that starts at or before it.
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

template <typename T>
__device__ __forceinline__ void update_block(const Parameters<compute_t<T>>& parameters) {
  constexpr int kPerUnit = kUnitBytes / sizeof(T);
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kUnitsPerBlock;
  const int64_t stop = min(unit + kUnitsPerBlock, parameters.units);
  for (int64_t index = entry_at(parameters, unit); unit < stop; ++index) {
    const Entry& entry = parameters.entries[index];
    const int64_t entry_units = (entry.numel + kPerUnit - 1) / kPerUnit;
    const int64_t next = min(entry.first_unit + entry_units, stop);
    const int64_t begin = (unit - entry.first_unit) * kPerUnit;
    const int64_t end = min((next - entry.first_unit) * kPerUnit, entry.numel);
    const Piece<T> piece{static_cast<T*>(entry.param) + begin,
                         static_cast<const T*>(entry.grad) + begin,
                         static_cast<T*>(entry.momentum) + begin};
    const int size = static_cast<int>(end - begin);
    const bool aligned =
        ((reinterpret_cast<uintptr_t>(entry.param) | reinterpret_cast<uintptr_t>(entry.grad) |
          reinterpret_cast<uintptr_t>(entry.momentum)) %
         kUnitBytes) == 0;
    const int in_vectors = aligned ? size / kPerUnit * kPerUnit : 0;
    update_range<T, kPerUnit>(parameters.coefficients, piece, 0, in_vectors);
    update_range<T, 1>(parameters.coefficients, piece, in_vectors, size);
    unit = next;
  }
}

}  // namespace

// Six blocks of 256 threads an SM leave each thread 40 registers.
#define PROX_SGD_KERNEL(name, T)                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 6)               \
      name(const __grid_constant__ Parameters<compute_t<T>> parameters) { \
    update_block<T>(parameters);                                          \
  }
PROX_SGD_KERNEL(prox_sgd_float32, float)
PROX_SGD_KERNEL(prox_sgd_float64, double)
PROX_SGD_KERNEL(prox_sgd_float16, Half)
PROX_SGD_KERNEL(prox_sgd_bfloat16, BFloat16)
#undef PROX_SGD_KERNEL

const void* kernel_address(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return reinterpret_cast<const void*>(&prox_sgd_float32);
    case DType::float64:
      return reinterpret_cast<const void*>(&prox_sgd_float64);
    case DType::float16:
      return reinterpret_cast<const void*>(&prox_sgd_float16);
    default:
      return reinterpret_cast<const void*>(&prox_sgd_bfloat16);
  }
}

}  // namespace prox_sgd::cuda
