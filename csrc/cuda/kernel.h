// What a launch hands to the kernel, and the numbers that plan and kernel must agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../prox_sgd_math.h"

namespace prox_sgd::cuda {

// Kernel parameters may take 32,764 bytes from CUDA 12.1 on and 4 KiB before (CUDA C++ Programming
// Guide, "__global__ function parameters"). setup.py says which, to the kernel and to the plan
// alike: the plan's compiler can't know what nvcc's release is.
#if !defined(PROX_SGD_PARAMETER_BYTES)
#define PROX_SGD_PARAMETER_BYTES 32764
#endif

constexpr int kThreads = 256;
constexpr int kUnitsPerBlock = 4 * kThreads;

// A parameter in the table. Parameters are laid end to end in units of as many elements as 16 bytes
// of their widest type hold; a parameter's last unit may be partly filled. Empty ones are left out.
struct Entry {
  Operands operands;
  int64_t first_unit;
};

template <typename C>
struct Parameters {
  static constexpr int kCapacity =
      static_cast<int>((PROX_SGD_PARAMETER_BYTES - sizeof(Coefficients<C>) - sizeof(Varying) -
                        sizeof(DeviceValues) - 3 * sizeof(int64_t)) /
                       sizeof(Entry));

  Coefficients<C> coefficients;
  Varying varying;
  DeviceValues values;
  int64_t varies;  // whether device memory holds any value that coefficients depend on
  int64_t units;   // of all entries together
  int64_t count;   // entries in use
  Entry entries[kCapacity];
};

static_assert(sizeof(Parameters<float>) <= PROX_SGD_PARAMETER_BYTES, "table too large");
static_assert(sizeof(Parameters<double>) <= PROX_SGD_PARAMETER_BYTES, "table too large");

// The address by which the CUDA runtime knows the kernel for a kind.
const void* kernel_address(Kind kind);

// The size of the parameter that the kernel for a kind was compiled with.
size_t parameter_bytes(Kind kind);

}  // namespace prox_sgd::cuda
