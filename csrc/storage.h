// The types that a parameter and its state are stored in.
#pragma once

#include <cstdint>

#include "math/float_types.h"

namespace prox_sgd {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// The storage types of one parameter's tensors; each has a kernel. Where the name holds one type,
// parameter, gradient and momentum buffer all have it. A master is a float32 copy of a 16-bit
// parameter: the step reads and writes it and only writes the parameter, and the momentum buffer is
// float32 unless the name says otherwise.
enum class Storage : int32_t {
  float32 = 0,
  float64 = 1,
  float16 = 2,
  bfloat16 = 3,
  float32_momentum_bfloat16 = 4,
  bfloat16_master = 5,
  bfloat16_master_momentum_bfloat16 = 6,
  float16_master = 7,
};

constexpr const char* kStorageNames[] = {
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float32_momentum_bfloat16",
    "bfloat16_master",
    "bfloat16_master_momentum_bfloat16",
    "float16_master",
};

constexpr const char* name_of(Storage storage) { return kStorageNames[static_cast<int>(storage)]; }

// The C++ types of a storage. Without a master, Weight is the parameter's own type.
template <typename P, typename M, typename W, bool kMaster>
struct StorageTypes {
  using Param = P;
  using Grad = P;
  using MomentumBuffer = M;
  using Weight = W;  // of the tensor that the step updates: the master, or the parameter
  using Compute = compute_t<W>;
  static constexpr bool has_master = kMaster;
  // Elements that fill 16 bytes of the widest type.
  static constexpr int per_unit = static_cast<int>(16 / sizeof(W));
};

template <typename T>
using OneType = StorageTypes<T, T, T, false>;

template <Storage kStorage>
struct TypesOf;
template <>
struct TypesOf<Storage::float32> : OneType<float> {};
template <>
struct TypesOf<Storage::float64> : OneType<double> {};
template <>
struct TypesOf<Storage::float16> : OneType<Half> {};
template <>
struct TypesOf<Storage::bfloat16> : OneType<BFloat16> {};
template <>
struct TypesOf<Storage::float32_momentum_bfloat16> : StorageTypes<float, BFloat16, float, false> {};
template <>
struct TypesOf<Storage::bfloat16_master> : StorageTypes<BFloat16, float, float, true> {};
template <>
struct TypesOf<Storage::bfloat16_master_momentum_bfloat16>
    : StorageTypes<BFloat16, BFloat16, float, true> {};
template <>
struct TypesOf<Storage::float16_master> : StorageTypes<Half, float, float, true> {};

template <Storage kStorage>
struct StorageTag {
  static constexpr Storage storage = kStorage;
};

// Calls f(StorageTag<storage>()): turns a run-time storage into a compile-time one.
template <typename F>
auto with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::float32:
      return f(StorageTag<Storage::float32>());
    case Storage::float64:
      return f(StorageTag<Storage::float64>());
    case Storage::float16:
      return f(StorageTag<Storage::float16>());
    case Storage::bfloat16:
      return f(StorageTag<Storage::bfloat16>());
    case Storage::float32_momentum_bfloat16:
      return f(StorageTag<Storage::float32_momentum_bfloat16>());
    case Storage::bfloat16_master:
      return f(StorageTag<Storage::bfloat16_master>());
    case Storage::bfloat16_master_momentum_bfloat16:
      return f(StorageTag<Storage::bfloat16_master_momentum_bfloat16>());
    default:
      return f(StorageTag<Storage::float16_master>());
  }
}

}  // namespace prox_sgd
