// Vector accesses of the CUDA kernels: 16 bytes of the widest type at a time.
#pragma once

#include <cstdint>

#include "../math/float_types.h"

namespace prox_sgd::cuda {

// N elements that one access moves: a whole unit, or a single element. Stores are spelled __stwb,
// as nvcc splits the assignment of a vector into its elements.
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

// Whether a vector access of N elements may start there.
template <int N, typename T>
__device__ __forceinline__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % (N * sizeof(T)) == 0;
}

}  // namespace prox_sgd::cuda
