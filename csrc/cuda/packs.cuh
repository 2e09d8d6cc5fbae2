// Vector accesses of the CUDA kernels: 16 bytes of the widest type at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../math/float_types.h"

namespace prox_sgd::cuda {

// N elements that one access moves: a whole unit, or a single element.
template <typename T, int N>
struct Pack {
  T values[N];
};

// Whether memory is read or written only once in a training step, or again soon: the forward pass
// reads new weights. PROX_SGD_CACHE_HINTS lets what is used once leave the caches first (.cs,
// "cache streaming"). No GPU has measured it, so the build doesn't define it.
enum class Use { once, again };

__device__ __forceinline__ uint4 load_word(const uint4* from) { return *from; }
__device__ __forceinline__ uint2 load_word(const uint2* from) { return *from; }

// Plain stores. An assignment is split by nvcc into the elements of the vector, and __stwb compiles
// to a store of strong memory ordering.
__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
__device__ __forceinline__ void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
               "r"(word.y)
               : "memory");
}

template <Use kUse, typename T>
__device__ __forceinline__ void read(const T* from, Pack<T, 1>& pack) {
  pack.values[0] = *from;
}

template <Use kUse, typename T>
__device__ __forceinline__ void write(T* to, const Pack<T, 1>& pack) {
  *to = pack.values[0];
}

template <typename T, int N>
using Word = std::conditional_t<sizeof(Pack<T, N>) == sizeof(uint4), uint4, uint2>;

template <Use kUse, typename T, int N>
__device__ __forceinline__ void read(const T* from, Pack<T, N>& pack) {
  const auto* word = reinterpret_cast<const Word<T, N>*>(from);
#if defined(PROX_SGD_CACHE_HINTS)
  pack = bit_cast<Pack<T, N>>(kUse == Use::once ? __ldcs(word) : load_word(word));
#else
  pack = bit_cast<Pack<T, N>>(load_word(word));
#endif
}

template <Use kUse, typename T, int N>
__device__ __forceinline__ void write(T* to, const Pack<T, N>& pack) {
  auto* word = reinterpret_cast<Word<T, N>*>(to);
#if defined(PROX_SGD_CACHE_HINTS)
  if (kUse == Use::once) return __stcs(word, bit_cast<Word<T, N>>(pack));
#endif
  store_word(word, bit_cast<Word<T, N>>(pack));
}

// Whether a vector access of N elements may start there.
template <int N, typename T>
__device__ __forceinline__ bool aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % (N * sizeof(T)) == 0;
}

}  // namespace prox_sgd::cuda
