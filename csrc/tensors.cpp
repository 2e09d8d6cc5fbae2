#include "tensors.h"

#include <algorithm>
#include <array>
#include <stdexcept>

namespace prox_sgd {

namespace {

constexpr int kMostDims = 64;  // torch's own limit

bool our_dtype(const dlpack::DataType& type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat && type.bits == 16) {
    *out = DType::bfloat16;
    return true;
  }
  if (type.code != dlpack::kFloat) return false;
  switch (type.bits) {
    case 16:
      *out = DType::float16;
      return true;
    case 32:
      *out = DType::float32;
      return true;
    case 64:
      *out = DType::float64;
      return true;
    default:
      return false;
  }
}

// The kind that has these storage types. `momentum` and `master` are null where there is none.
bool kind_of(DType param, DType grad, const DType* momentum, const DType* master, Kind* out) {
  if (grad != param) return false;
  if (master != nullptr) {
    if (*master != DType::float32) return false;
    const bool wide = momentum == nullptr || *momentum == DType::float32;
    if (param == DType::bfloat16 && wide) {
      *out = Kind::bfloat16_master;
    } else if (param == DType::bfloat16 && *momentum == DType::bfloat16) {
      *out = Kind::bfloat16_master_momentum_bfloat16;
    } else if (param == DType::float16 && wide) {
      *out = Kind::float16_master;
    } else {
      return false;
    }
    return true;
  }
  if (momentum == nullptr || *momentum == param) {
    *out = static_cast<Kind>(param);  // the uniform kinds have the dtypes' numbers
    return true;
  }
  *out = Kind::float32_momentum_bfloat16;
  return param == DType::float32 && *momentum == DType::bfloat16;
}

}  // namespace

const char* describe(Unfit reason) {
  switch (reason) {
    case Unfit::fit:
      return "fits";
    case Unfit::type:
      return "it is a subclass of torch.Tensor";
    case Unfit::unreadable:
      return "its memory can't be read";
    case Unfit::device:
      return "it is neither on a CPU nor on a CUDA device";
    case Unfit::dtype:
      return "its dtype is none of float32, float64, bfloat16 and float16";
    case Unfit::not_dense:
      return "it is not dense: it has gaps, overlaps or repeats in memory";
    case Unfit::mixed:
      return "its gradient, momentum buffer or master weight has another shape, device or dtype";
    case Unfit::layout:
      return "its gradient, momentum buffer or master weight has another memory layout";
    case Unfit::no_cuda:
      return "its CUDA device can't be used";
    default:
      return "its gradient is a lazily negated view";
  }
}

// What is read of one tensor. The arrays are torch's own with the exchange API, and `own` without.
struct TensorReader::View {
  dlpack::Tensor tensor;
  std::array<int64_t, 2 * kMostDims> own;

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t i = 0; i < tensor.ndim; ++i) n *= tensor.shape[i];
    return n;
  }

  // Whether the elements fill one block of memory, each its own place, in whatever order.
  bool dense() const {
    int64_t expected = 1;
    bool row_major = true;
    for (int32_t i = tensor.ndim - 1; i >= 0 && row_major; --i) {
      if (tensor.shape[i] == 1) continue;
      row_major = tensor.strides[i] == expected;
      expected *= tensor.shape[i];
    }
    if (row_major) return true;
    // Another order: find the dimensions from the innermost to the outermost.
    expected = 1;
    uint64_t done = 0;
    for (int32_t round = 0; round < tensor.ndim; ++round) {
      int32_t next = -1;
      for (int32_t i = 0; i < tensor.ndim; ++i) {
        if (tensor.shape[i] == 1) {
          done |= uint64_t{1} << i;
        } else if (!(done >> i & 1) && tensor.strides[i] == expected) {
          next = i;
          break;
        }
      }
      if (next < 0) break;
      done |= uint64_t{1} << next;
      expected *= tensor.shape[next];
    }
    const uint64_t all = tensor.ndim == 64 ? ~uint64_t{0} : (uint64_t{1} << tensor.ndim) - 1;
    return done == all;
  }

  bool same_shape(const View& other) const {
    return tensor.ndim == other.tensor.ndim &&
           std::equal(tensor.shape, tensor.shape + tensor.ndim, other.tensor.shape);
  }

  // A stride says nothing where the size is 1; gradients of 1x1 kernels differ in just those.
  bool same_layout(const View& other) const {
    for (int32_t i = 0; i < tensor.ndim; ++i) {
      if (tensor.shape[i] != 1 && tensor.strides[i] != other.tensor.strides[i]) return false;
    }
    return true;
  }

  bool same_device(const View& other) const {
    return tensor.device.device_type == other.tensor.device.device_type &&
           tensor.device.device_id == other.tensor.device.device_id;
  }

  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
};

namespace {

OwnedObject share(PyObject* object) {
  Py_INCREF(object);
  return OwnedObject(object);
}

}  // namespace

TensorReader::TensorReader(PyObject* exchange_api, PyObject* describe, PyObject* stream,
                           PyObject* is_neg, PyObject* tensor_type, PyObject* parameter_type)
    : describe_(share(describe)),
      stream_(share(stream)),
      is_neg_(share(is_neg)),
      tensor_type_(share(tensor_type)),
      parameter_type_(share(parameter_type)),
      grad_name_(PyUnicode_InternFromString("grad")),
      momentum_name_(PyUnicode_InternFromString("momentum_buffer")),
      master_name_(PyUnicode_InternFromString("master_weight")) {
  if (!grad_name_ || !momentum_name_ || !master_name_) throw std::bad_alloc();
  if (exchange_api == Py_None) return;
  const void* table = PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api");
  if (table == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument("not a DLPack exchange API");
  }
  // A table of another major version has another layout; the one for version 1 may stand behind.
  for (auto* api = static_cast<const dlpack::ExchangeApi*>(table); api; api = api->prev_api) {
    if (api->version.major == 1) {
      if (api->dltensor_from_py_object_no_sync != nullptr) api_ = api;
      break;
    }
  }
  capsule_ = share(exchange_api);
}

bool TensorReader::plain(PyObject* tensor) const {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == tensor_type_.get() || type == parameter_type_.get();
}

bool TensorReader::view(PyObject* tensor, View* out) const {
  dlpack::Tensor& t = out->tensor;
  if (api_ != nullptr) {
    if (api_->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    return t.ndim <= kMostDims;
  }
  PyObject* description = PyObject_CallOneArg(describe_.get(), tensor);
  if (description == nullptr) {
    PyErr_Clear();
    return false;
  }
  unsigned long long address = 0;
  int code = 0;
  int bits = 0;
  PyObject* shape = nullptr;
  PyObject* strides = nullptr;
  bool good = PyArg_ParseTuple(description, "KiiiiOO", &address, &t.device.device_type,
                               &t.device.device_id, &code, &bits, &shape, &strides) &&
              PyTuple_Check(shape) && PyTuple_Check(strides) &&
              PyTuple_GET_SIZE(shape) == PyTuple_GET_SIZE(strides) &&
              PyTuple_GET_SIZE(shape) <= kMostDims;
  if (good) {
    t.data = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
    t.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    t.byte_offset = 0;
    t.ndim = static_cast<int32_t>(PyTuple_GET_SIZE(shape));
    t.shape = out->own.data();
    t.strides = out->own.data() + kMostDims;
    for (int32_t i = 0; i < t.ndim; ++i) {
      t.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      t.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    good = PyErr_Occurred() == nullptr;
  }
  PyErr_Clear();
  Py_DECREF(description);
  return good;
}

Unfit TensorReader::check(PyObject* param, PyObject* grad, PyObject* momentum, PyObject* master,
                          Bucket* key, Operands* out) const {
  // The parameter first; the others are compared with it.
  PyObject* const tensors[] = {param, grad, momentum, master};
  View views[4];
  DType dtypes[4];
  for (int i = 0; i < 4; ++i) {
    if (tensors[i] != nullptr && !plain(tensors[i])) return Unfit::type;
  }
  PyObject* negated = PyObject_CallOneArg(is_neg_.get(), grad);
  Py_XDECREF(negated);  // what Python knows as True and False outlives us
  if (negated == nullptr) PyErr_Clear();
  if (negated != Py_False) return negated == Py_True ? Unfit::negated : Unfit::unreadable;
  for (int i = 0; i < 4; ++i) {
    if (tensors[i] != nullptr && !view(tensors[i], &views[i])) return Unfit::unreadable;
  }
  const View& p = views[0];
  const dlpack::Device device = p.tensor.device;
  if (device.device_type != dlpack::kCPU && device.device_type != dlpack::kCUDA) {
    return Unfit::device;
  }
  if (!our_dtype(p.tensor.dtype, &dtypes[0])) return Unfit::dtype;
  bool same_layout = true;
  bool readable = p.tensor.data != nullptr;
  for (int i = 1; i < 4; ++i) {
    if (tensors[i] == nullptr) continue;
    const View& v = views[i];
    if (!our_dtype(v.tensor.dtype, &dtypes[i]) || !p.same_device(v) || !p.same_shape(v)) {
      return Unfit::mixed;
    }
    same_layout = same_layout && p.same_layout(v);
    readable = readable && v.tensor.data != nullptr;
  }
  if (!kind_of(dtypes[0], dtypes[1], momentum ? &dtypes[2] : nullptr, master ? &dtypes[3] : nullptr,
               &key->kind)) {
    return Unfit::mixed;
  }
  key->device_type = device.device_type;
  key->device_id = device.device_id;
  const int64_t numel = p.numel();
  *out = {p.data(),
          views[1].data(),
          momentum ? views[2].data() : nullptr,
          master ? views[3].data() : nullptr,
          numel,
          nullptr};
  if (numel == 0) return Unfit::fit;
  if (!p.dense()) return Unfit::not_dense;
  if (!same_layout) return Unfit::layout;
  if (!readable) return Unfit::unreadable;
  if (device.device_type == dlpack::kCUDA && cuda::why_unusable(device.device_id)[0] != '\0') {
    return Unfit::no_cuda;
  }
  return Unfit::fit;
}

namespace {

// Puts operands into the bucket of their device and kind, which mostly is the one used last.
class Sorter {
 public:
  Sorter(std::vector<Bucket>* buckets, Py_ssize_t count) : buckets_(buckets), count_(count) {}

  void add(const Bucket& key, const Operands& operands) {
    const auto belongs = [&](const Bucket& b) {
      return b.kind == key.kind && b.device_type == key.device_type && b.device_id == key.device_id;
    };
    if (last_ >= buckets_->size() || !belongs((*buckets_)[last_])) {
      const auto found = std::find_if(buckets_->begin(), buckets_->end(), belongs);
      last_ = static_cast<size_t>(found - buckets_->begin());
      if (found == buckets_->end()) {
        buckets_->push_back(key);
        buckets_->back().operands.reserve(static_cast<size_t>(count_));
      }
    }
    (*buckets_)[last_].operands.push_back(operands);
  }

 private:
  std::vector<Bucket>* buckets_;
  Py_ssize_t count_;
  size_t last_ = 0;
};

}  // namespace

Reading TensorReader::read(PyObject* params, PyObject* grads, PyObject* momenta, PyObject* masters,
                           int64_t* zeros) const {
  Reading reading;
  const auto item = [](PyObject* list, Py_ssize_t i) {
    return list == Py_None ? nullptr : PyList_GET_ITEM(list, i);
  };
  const Py_ssize_t count = PyList_GET_SIZE(params);
  Sorter sorter(&reading.buckets, count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    Bucket key{};
    Operands operands{};
    const Unfit reason = check(PyList_GET_ITEM(params, i), PyList_GET_ITEM(grads, i),
                               item(momenta, i), item(masters, i), &key, &operands);
    if (reason != Unfit::fit) {
      reading.misfits.push_back({i, reason});
      continue;
    }
    if (zeros != nullptr) operands.zeros = zeros + i;
    sorter.add(key, operands);
  }
  return reading;
}

std::optional<Gathered> TensorReader::gather(PyObject* params, PyObject* state, bool with_momenta,
                                             bool with_masters, int64_t* zeros,
                                             Py_ssize_t* position) const {
  const Py_ssize_t count = PyList_GET_SIZE(params);
  Gathered gathered{OwnedObject(PyList_New(0)), OwnedObject(PyList_New(0)),
                    OwnedObject(with_momenta ? PyList_New(0) : nullptr),
                    OwnedObject(with_masters ? PyList_New(0) : nullptr), Reading{}};
  View first;
  if (zeros != nullptr && count > 0 &&
      !(plain(PyList_GET_ITEM(params, 0)) && view(PyList_GET_ITEM(params, 0), &first))) {
    return std::nullopt;
  }
  Sorter sorter(&gathered.reading.buckets, count);
  Py_ssize_t here = *position;
  Py_ssize_t taken = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const param = PyList_GET_ITEM(params, i);
    const OwnedObject grad(PyObject_GetAttr(param, grad_name_.get()));
    PyObject* of_param = nullptr;
    if (with_momenta || with_masters) {
      PyObject* next = nullptr;
      Py_ssize_t after = here;
      if (PyDict_Next(state, &after, &next, &of_param) && next == param) {
        here = after;
      } else {
        of_param = grad.get() == Py_None ? nullptr : PyDict_GetItemWithError(state, param);
      }
    }
    if (grad.get() == Py_None) continue;
    const auto append = [](const OwnedObject& list, PyObject* item) {
      return item != nullptr && PyList_Append(list.get(), item) == 0;
    };
    const auto of_state = [&](const OwnedObject& name) {
      const bool known = of_param != nullptr && PyDict_CheckExact(of_param);
      return known ? PyDict_GetItemWithError(of_param, name.get()) : nullptr;
    };
    PyObject* const momentum = with_momenta ? of_state(momentum_name_) : nullptr;
    PyObject* const master = with_masters ? of_state(master_name_) : nullptr;
    Bucket key{};
    Operands operands{};
    if (!append(gathered.params, param) || !append(gathered.grads, grad.get()) ||
        (with_momenta && !append(gathered.momenta, momentum)) ||
        (with_masters && !append(gathered.masters, master)) ||
        check(param, grad.get(), momentum, master, &key, &operands) != Unfit::fit) {
      PyErr_Clear();
      return std::nullopt;
    }
    if (zeros != nullptr) {
      if (key.device_type != first.tensor.device.device_type ||
          key.device_id != first.tensor.device.device_id) {
        return std::nullopt;
      }
      operands.zeros = zeros + taken;
    }
    ++taken;
    sorter.add(key, operands);
  }
  *position = here;
  return gathered;
}

void* TensorReader::current_stream(int32_t device_type, int32_t device_id) const {
  void* stream = nullptr;
  bool told = false;
  if (api_ != nullptr && api_->current_work_stream != nullptr) {
    told = api_->current_work_stream(device_type, device_id, &stream) == 0;
  } else if (PyObject* address =
                 PyObject_CallFunction(stream_.get(), "i", static_cast<int>(device_id))) {
    stream = PyLong_AsVoidPtr(address);
    told = PyErr_Occurred() == nullptr;
    Py_DECREF(address);
  }
  PyErr_Clear();
  if (!told) throw std::runtime_error("ProxSGD: torch did not tell its current stream");
  return stream;
}

}  // namespace prox_sgd
