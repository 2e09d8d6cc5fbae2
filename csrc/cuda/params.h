// The parameter of the CUDA kernels, and the constants that plan and kernel share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../math/update.h"

namespace prox_sgd::cuda {

// Kernel parameters may take 32,764 bytes from CUDA 12.1 on and 4 KiB before (CUDA C++ Programming
// Guide, "__global__ function parameters"). The build defines the size for kernel and plan alike,
// as the plan's compiler doesn't know nvcc's release.
#if !defined(PROX_SGD_PARAMETER_BYTES)
#define PROX_SGD_PARAMETER_BYTES 32764
#endif

// A launch copies the whole table, so the kernels towards zero are compiled for two sizes of it
// where there is room: ResNet-50's 161 parameters fit in the smaller. In the kernels' names they
// are 12k and 32k. The kernels towards a start have the smaller only.
constexpr int kSmallTable = PROX_SGD_PARAMETER_BYTES < 12288 ? PROX_SGD_PARAMETER_BYTES : 12288;
constexpr int kLargeTable = PROX_SGD_PARAMETER_BYTES;

constexpr int kThreads = 256;
constexpr int kUnitsPerBlock = 4 * kThreads;

// A block walks the parameters in its range one after the other, and waits for memory in each.
constexpr int kMostPieces = 4;

// A bucket's options as a kernel takes them. A launch has room for kMostGroups.
template <typename C>
struct Group {
  Coefficients<C> coefficients;
  ScheduledOptions scheduled;
  DeviceValues values;
  int64_t reads_device;  // whether device memory holds a value that coefficients depend on
};

constexpr int kMostGroups = 8;

template <typename C>
Group<C> group_of(const Options& options, const DeviceValues& v) {
  Group<C> group;
  std::memset(static_cast<void*>(&group), 0, sizeof group);  // padding is copied, too
  group.coefficients = coefficients<C>(options);
  group.scheduled = scheduled(options);
  group.values = v;
  group.reads_device = v.lr || v.l1 || v.grad_scale || v.grad_coefficient;
  return group;
}

// A parameter in the table. Parameters lie one behind the other in units: as many elements as 16
// bytes of their widest type hold. A parameter's last unit may be partly filled; empty parameters
// are left out. A gap ends where a block's range does.
struct Entry {
  Operands operands;
  int64_t first_unit : 48;
  int64_t group : 16;
};

template <typename C>
struct Header {
  int32_t count;  // entries in use
  Group<C> groups[kMostGroups];
};

template <typename C>
constexpr int capacity(int bytes) {
  return static_cast<int>((bytes - sizeof(Header<C>)) / sizeof(Entry));
}

template <typename C, int kBytes>
struct Table {
  Header<C> header;
  Entry entries[capacity<C>(kBytes)];
};

static_assert(sizeof(Table<float, kLargeTable>) <= PROX_SGD_PARAMETER_BYTES, "table too large");
static_assert(sizeof(Table<double, kLargeTable>) <= PROX_SGD_PARAMETER_BYTES, "table too large");
static_assert(kSmallTable < 12288 || capacity<double>(kSmallTable) >= 161, "table too small");

// The address by which the CUDA runtime knows a storage's kernel, towards zero or the start, for
// tables of so many bytes; null where there is none.
const void* kernel_address(Storage storage, bool towards_start, size_t table_bytes);

}  // namespace prox_sgd::cuda
