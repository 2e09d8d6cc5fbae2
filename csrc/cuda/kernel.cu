// The CUDA kernel: every tensor of a bucket in one launch, one pass over memory.
//
// The bucket's tensors lie end to end in units of 16 bytes of their widest type, and each block
// takes kUnitsPerBlock units of that line, whatever tensors they belong to: all blocks but the last
// have the same work. Where all addresses of a parameter are aligned, a thread moves whole units;
// where they are not, and in a last unit that isn't full, single elements, neighbours by
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
__device__ __forceinline__ void read(const T* from, Pack<T, 4>& pack) {
  const uint2 word = *reinterpret_cast<const uint2*>(from);
  split(word.x, pack.values[0], pack.values[1]);
  split(word.y, pack.values[2], pack.values[3]);
}

template <typename T>
__device__ __forceinline__ void write(T* to, const Pack<T, 4>& pack) {
  const T* v = pack.values;
  __stwb(reinterpret_cast<uint2*>(to), make_uint2(join(v[0], v[1]), join(v[2], v[3])));
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

// Updates kCount packs of N elements, `stride` elements apart; returns how many are zero then. All
// loads come before the first use. A block's piece is short, so that offsets in it are 32-bit while
// addresses and sizes are 64-bit.
template <typename T, int N, int kCount>
__device__ __forceinline__ int update_packs(const Coefficients<typename T::Compute>& c,
                                            const Piece<T>& t, int at, int stride) {
  using C = typename T::Compute;
  Pack<typename T::Weight, N> p[kCount];
  Pack<typename T::Grad, N> g[kCount];
  Pack<typename T::Momentum, N> m[kCount] = {};
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    read(t.weight + at + k * stride, p[k]);
    read(t.grad + at + k * stride, g[k]);
  }
  if (c.mode == Momentum::running) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) read(t.momentum + at + k * stride, m[k]);
  }
  int zeros = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    Pack<typename T::Param, N> stored;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      C pi = load(p[k].values[i]);
      C mi = load(m[k].values[i]);
      update(c, c.mode, Steps::all, pi, load(g[k].values[i]), mi);
      p[k].values[i] = store<typename T::Weight>(pi);
      m[k].values[i] = store<typename T::Momentum>(mi);
      stored.values[i] = store<typename T::Param>(pi);
      zeros += is_zero(stored.values[i]);
    }
    write(t.param + at + k * stride, stored);
    if constexpr (T::has_master) write(t.weight + at + k * stride, p[k]);
    if (c.mode != Momentum::none) write(t.momentum + at + k * stride, m[k]);
  }
  return zeros;
}

// Packs of each tensor that a thread reads before it computes: what its registers hold. That is one
// where computing needs more registers than a float32 a word; parameter, gradient and momentum then
// still are three loads in flight.
template <typename T>
constexpr int loads_in_flight = sizeof(typename T::Weight) == sizeof(float) ? 2 : 1;

// Elements [begin, end) of the piece in packs of N, by all threads of the block; N divides
// end - begin. Returns how many of this thread's elements are zero then.
template <typename T, int N>
__device__ __forceinline__ int update_range(const Coefficients<typename T::Compute>& c,
                                            const Piece<T>& piece, int begin, int end) {
  constexpr int kStride = kThreads * N;
  constexpr int kCount = loads_in_flight<T>;
  int zeros = 0;
  int at = begin + static_cast<int>(threadIdx.x) * N;
  for (; at + (kCount - 1) * kStride < end; at += kCount * kStride) {
    zeros += update_packs<T, N, kCount>(c, piece, at, kStride);
  }
  if (kCount == 2 && at < end) zeros += update_packs<T, N, 1>(c, piece, at, kStride);
  return zeros;
}

// Adds every thread's number to a counter, with one atomic addition a warp. All threads of the
// block must come here.
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

// The coefficients, with what only device memory tells.
template <typename C>
__device__ __forceinline__ Coefficients<C> coefficients_now(const Parameters<C>& parameters) {
  Coefficients<C> c = parameters.coefficients;
  if (parameters.varies) {
    const DeviceValues& from = parameters.values;
    Varying v = parameters.varying;
    if (from.lr) v.lr = *from.lr;
    if (from.l1) v.l1 = *from.l1;
    if (from.grad_scale) v.grad_scale = *from.grad_scale;
    if (from.grad_coefficient) v.grad_coefficient = *from.grad_coefficient;
    set(c, v);
  }
  return c;
}

// Whether a vector access of N elements may start there.
template <int N, typename T>
__device__ __forceinline__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % (N * sizeof(T)) == 0;
}

template <typename T>
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
    const auto piece = piece_from<T>(o, begin);
    const int size = static_cast<int>(end - begin);
    const bool vectors = aligned<N>(piece.param) && aligned<N>(piece.grad) &&
                         aligned<N>(piece.momentum) && aligned<N>(piece.weight);
    const int in_vectors = vectors ? size / N * N : 0;
    int zeros = update_range<T, N>(c, piece, 0, in_vectors);
    zeros += update_range<T, 1>(c, piece, in_vectors, size);
    if (o.zeros) add_to(o.zeros, zeros);
    unit = next;
  }
}

}  // namespace

template <Kind kKind>
const void* address();

// Four blocks of 256 threads an SM leave each thread 64 registers.
#define PROX_SGD_KERNEL(kind)                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 4) prox_sgd_##kind(                \
      const __grid_constant__ Parameters<typename Types<Kind::kind>::Compute> parameters) { \
    update_block<Types<Kind::kind>>(parameters);                                            \
  }                                                                                         \
  template <>                                                                               \
  const void* address<Kind::kind>() {                                                       \
    return reinterpret_cast<const void*>(&prox_sgd_##kind);                                 \
  }
PROX_SGD_KERNEL(float32)
PROX_SGD_KERNEL(float64)
PROX_SGD_KERNEL(float16)
PROX_SGD_KERNEL(bfloat16)
PROX_SGD_KERNEL(float32_momentum_bfloat16)
PROX_SGD_KERNEL(bfloat16_master)
PROX_SGD_KERNEL(bfloat16_master_momentum_bfloat16)
PROX_SGD_KERNEL(float16_master)
#undef PROX_SGD_KERNEL

const void* kernel_address(Kind kind) {
  return with_kind(kind, [](auto tag) { return address<decltype(tag)::kind>(); });
}

size_t parameter_bytes(Kind kind) {
  return with_kind(kind, [](auto tag) {
    return sizeof(Parameters<typename Types<decltype(tag)::kind>::Compute>);
  });
}

}  // namespace prox_sgd::cuda
