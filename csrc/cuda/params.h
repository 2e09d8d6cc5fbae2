// The parameter of the CUDA kernels, and the constants that plan and kernel share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/update.h"

namespace prox_sgd::cuda {

// Kernel parameters may take 32,764 bytes from CUDA 12.1 on and 4 KiB before (CUDA C++ Programming
// Guide, "__global__ function parameters"). The build defines the size for kernel and plan alike,
// as the plan's compiler doesn't know nvcc's release.
#if !defined(PROX_SGD_PARAMETER_BYTES)
#define PROX_SGD_PARAMETER_BYTES 32764
#endif

constexpr int kThreads = 256;
constexpr int kUnitsPerBlock = 4 * kThreads;

// A parameter in the table. Parameters lie end to end in units: as many elements as 16 bytes of
// their widest type hold. A parameter's last unit may be partly filled; empty parameters are left
// out.
struct Entry {
  Operands operands;
  int64_t first_unit;
};

template <typename C>
struct Parameters {
  static constexpr int kCapacity =
      static_cast<int>((PROX_SGD_PARAMETER_BYTES - sizeof(Coefficients<C>) -
                        sizeof(ScheduledOptions) - sizeof(DeviceValues) - 3 * sizeof(int64_t)) /
                       sizeof(Entry));

  Coefficients<C> coefficients;
  ScheduledOptions scheduled;
  DeviceValues values;
  int64_t reads_device;  // whether device memory holds a value that coefficients depend on
  int64_t units;         // of all entries together
  int64_t count;         // entries in use
  Entry entries[kCapacity];
};

static_assert(sizeof(Parameters<float>) <= PROX_SGD_PARAMETER_BYTES, "table too large");
static_assert(sizeof(Parameters<double>) <= PROX_SGD_PARAMETER_BYTES, "table too large");

// The address by which the CUDA runtime knows a storage's kernel, towards zero or the start.
const void* kernel_address(Storage storage, bool towards_start);

// The size of the parameter that a storage's kernel was compiled with.
size_t parameter_bytes(Storage storage);

}  // namespace prox_sgd::cuda
