// The part of DLPack 1.3's binary interface that is read here, declared from the specification
// (https://dmlc.github.io/dlpack/latest/c_api.html). Names of fields and their order are DLPack's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prox_sgd::dlpack {

constexpr int32_t kCPU = 1;
constexpr int32_t kCUDA = 2;

constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

// The table behind type(tensor).__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
struct ExchangeApi {
  Version version;
  ExchangeApi* prev_api;  // an older major version's table, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills a view that borrows from the Python object. Non-zero with a Python exception on failure;
  // null where the producer has none.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

static_assert(sizeof(Tensor) == 48, "DLTensor's layout");
static_assert(offsetof(Tensor, shape) == 24, "DLTensor's layout");
static_assert(sizeof(ExchangeApi) == 56, "DLPackExchangeAPI's layout");

}  // namespace prox_sgd::dlpack
