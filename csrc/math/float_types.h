// Floating-point types of storage, their bits and their exact conversion to the compute type.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PROX_SGD_HD __host__ __device__ __forceinline__
#else
#define PROX_SGD_HD inline __attribute__((always_inline))
#endif

namespace prox_sgd {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// float32 computes for float32, float16 and bfloat16 storage; float64 for float64.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using compute_t = typename ComputeType<T>::type;

template <typename To, typename From>
PROX_SGD_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// From storage to the compute type, which holds every value of it.
PROX_SGD_HD float load(float x) { return x; }
PROX_SGD_HD double load(double x) { return x; }

PROX_SGD_HD float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

PROX_SGD_HD float load(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Exponent and mantissa move to float32's places, and the exponent's bias grows by 112; an
  // infinity or NaN gets float32's exponent. A subnormal is normal in float32, also where the user
  // flushes subnormals to zero: 2^-14 with its mantissa appended, minus 2^-14. No branches, so that
  // compilers vectorise it.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t smallest_normal = 113u << 23;  // 2^-14
  const float subnormal =
      bit_cast<float>(smallest_normal | magnitude) - bit_cast<float>(smallest_normal);
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t finite = magnitude < 0x00800000u ? bit_cast<uint32_t>(subnormal) : normal;
  const uint32_t finite_or_not = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return bit_cast<float>(finite_or_not | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

PROX_SGD_HD bool is_zero(float x) { return x == 0.0f; }
PROX_SGD_HD bool is_zero(double x) { return x == 0.0; }
PROX_SGD_HD bool is_zero(BFloat16 x) { return (x.bits & 0x7fffu) == 0; }
PROX_SGD_HD bool is_zero(Half x) { return (x.bits & 0x7fffu) == 0; }

// Masks are 32 bits wide for float64 too, which saves registers on a GPU. `bits`, all ones or 0,
// keeps or clears the whole value; `sign`, the sign bit or 0, is xor-ed into its upper word.
PROX_SGD_HD float keep(float x, uint32_t bits) {
  return bit_cast<float>(bit_cast<uint32_t>(x) & bits);
}
PROX_SGD_HD double keep(double x, uint32_t bits) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & (static_cast<uint64_t>(bits) << 32 | bits));
}
PROX_SGD_HD float flip(float x, uint32_t sign) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ sign);
}
PROX_SGD_HD double flip(double x, uint32_t sign) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ static_cast<uint64_t>(sign) << 32);
}

}  // namespace prox_sgd
