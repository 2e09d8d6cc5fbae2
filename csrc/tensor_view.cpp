#include "tensor_view.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace prox_sgd {

namespace {

constexpr int kMaxDims = 64;  // torch's own limit

// Passes on what isn't a failure to describe a tensor, such as KeyboardInterrupt.
void rethrow_unless_ordinary(py::error_already_set& error) {
  if (!error.matches(PyExc_Exception)) throw error;
}

// For a C function that failed and has left its exception set.
void clear_ordinary_error() {
  if (!PyErr_Occurred()) return;
  py::error_already_set error;
  rethrow_unless_ordinary(error);
}

// Only an exact int: nothing of Python may run while addresses are held.
long long as_int(py::handle object) {
  if (!PyLong_CheckExact(object.ptr())) throw std::invalid_argument("not an int");
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) n *= tensor.shape[i];
  return n;
}

bool TensorView::dtype(DType* out) const {
  const dlpack::DataType& type = tensor.dtype;
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat && type.bits == 16) {
    *out = DType::bfloat16;
    return true;
  }
  if (type.code != dlpack::kFloat) return false;
  if (type.bits == 16) {
    *out = DType::float16;
  } else if (type.bits == 32) {
    *out = DType::float32;
  } else if (type.bits == 64) {
    *out = DType::float64;
  } else {
    return false;
  }
  return true;
}

bool TensorView::is_dense() const {
  // Go from the innermost dimension to the outermost: each stride is the number of elements in the
  // dimensions inside it. Row-major tensors need one round through the loop.
  bool placed[kMaxDims] = {};
  int64_t expected = 1;
  int32_t left = 0;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    placed[i] = tensor.shape[i] == 1;  // such a stride is never used
    left += !placed[i];
  }
  for (bool found = true; found && left > 0;) {
    found = false;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      if (placed[i] || tensor.strides[i] != expected) continue;
      placed[i] = true;
      found = true;
      --left;
      expected *= tensor.shape[i];
    }
  }
  return left == 0;
}

bool TensorView::same_device(const TensorView& other) const {
  return tensor.device.device_type == other.tensor.device.device_type &&
         tensor.device.device_id == other.tensor.device.device_id;
}

bool TensorView::same_shape(const TensorView& other) const {
  return tensor.ndim == other.tensor.ndim &&
         std::equal(tensor.shape, tensor.shape + tensor.ndim, other.tensor.shape);
}

// A stride is never used where the size is 1: gradients of 1x1 convolutions differ there.
bool TensorView::same_layout(const TensorView& other) const {
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != other.tensor.strides[i]) return false;
  }
  return true;
}

TensorDescriber::TensorDescriber(py::object exchange_api, py::object describe,
                                 py::object current_stream)
    : capsule_(std::move(exchange_api)),
      describe_(std::move(describe)),
      current_stream_(std::move(current_stream)) {
  if (capsule_.is_none()) return;
  const void* table = PyCapsule_GetPointer(capsule_.ptr(), "dlpack_exchange_api");
  if (table == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("not a DLPack exchange API");
  }
  // Another major version's table has another layout; it links to older versions' tables.
  for (auto* api = static_cast<const dlpack::ExchangeApi*>(table); api; api = api->prev_api) {
    if (api->version.major == 1) {
      if (api->dltensor_from_py_object_no_sync != nullptr) api_ = api;
      break;
    }
  }
}

bool TensorDescriber::view(py::handle tensor, TensorView* out) const {
  if (api_ == nullptr) return view_described(tensor, out);
  if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &out->tensor) != 0) {
    clear_ordinary_error();
    return false;
  }
  return out->tensor.ndim <= kMaxDims;
}

bool TensorDescriber::view_described(py::handle tensor, TensorView* out) const {
  try {
    const auto described = py::tuple(describe_(tensor));
    if (described.size() != 7) return false;
    const auto shape = py::tuple(described[5]);
    const auto strides = py::tuple(described[6]);
    if (shape.size() != strides.size() || shape.size() > kMaxDims) return false;
    dlpack::Tensor& t = out->tensor;
    t = {};
    t.data = PyLong_AsVoidPtr(described[0].ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    t.device = {static_cast<int32_t>(as_int(described[1])),
                static_cast<int32_t>(as_int(described[2]))};
    t.dtype = {static_cast<uint8_t>(as_int(described[3])),
               static_cast<uint8_t>(as_int(described[4])), 1};
    t.ndim = static_cast<int32_t>(shape.size());
    out->owned_dims.clear();
    for (const py::tuple& dims : {shape, strides}) {
      for (const py::handle dim : dims) out->owned_dims.push_back(as_int(dim));
    }
    t.shape = out->owned_dims.data();
    t.strides = t.shape + t.ndim;
    return true;
  } catch (py::error_already_set& error) {
    rethrow_unless_ordinary(error);
    return false;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

void* TensorDescriber::current_stream(const dlpack::Device& device) const {
  void* stream = nullptr;
  bool told = false;
  if (api_ != nullptr && api_->current_work_stream != nullptr) {
    told = api_->current_work_stream(device.device_type, device.device_id, &stream) == 0;
    clear_ordinary_error();
  } else {
    try {
      stream = PyLong_AsVoidPtr(current_stream_(device.device_id).ptr());
      told = !PyErr_Occurred();
      clear_ordinary_error();
    } catch (py::error_already_set& error) {
      rethrow_unless_ordinary(error);
    }
  }
  if (!told) throw std::runtime_error("ProxSGD: torch did not tell its current stream");
  return stream;
}

}  // namespace prox_sgd
