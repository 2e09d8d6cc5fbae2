#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <utility>

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

// What is read of one tensor.
struct TensorReader::View {
  dlpack::Tensor tensor;

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
  Py_XINCREF(object);
  return OwnedObject(object);
}

// A list that holds what another does now; null with a Python error on failure.
OwnedObject copy_of(PyObject* list) {
  return OwnedObject(PyList_GetSlice(list, 0, PyList_GET_SIZE(list)));
}

// A list to be filled. Until that is done and it is tracked, nobody finds it by way of the garbage
// collector: its places hold nothing yet, which Python code can't cope with.
OwnedObject new_list(Py_ssize_t size) {
  OwnedObject list(PyList_New(size));
  if (list) PyObject_GC_UnTrack(list.get());
  return list;
}

// Forgets the Python error that there may be, as what can't be read is told of in another way.
void forget_error() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) throw Interrupted();
  PyErr_Clear();
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
  // The types are those two exactly, so what a look-up by name would find is known beforehand.
  const OwnedObject of_tensor(PyObject_GetAttr(tensor_type, grad_name_.get()));
  const OwnedObject of_parameter(PyObject_GetAttr(parameter_type, grad_name_.get()));
  PyErr_Clear();
  if (of_tensor.get() == of_parameter.get() && of_tensor &&
      Py_TYPE(of_tensor.get()) == &PyGetSetDescr_Type) {
    const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(of_tensor.get());
    get_grad_ = descriptor->d_getset->get;
    get_grad_with_ = descriptor->d_getset->closure;
  }
  if (Py_TYPE(is_neg) == &PyMethodDescr_Type) {
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(is_neg)->d_method;
    if (method->ml_flags == METH_NOARGS) call_is_neg_ = method->ml_meth;
  }
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

PyObject* TensorReader::grad_of(PyObject* param) const {
  return get_grad_ ? get_grad_(param, get_grad_with_) : PyObject_GetAttr(param, grad_name_.get());
}

PyObject* TensorReader::negated(PyObject* tensor) const {
  return call_is_neg_ ? call_is_neg_(tensor, nullptr) : PyObject_CallOneArg(is_neg_.get(), tensor);
}

bool TensorReader::view(PyObject* tensor, View* out, Dims* kept) const {
  dlpack::Tensor& t = out->tensor;
  if (api_ != nullptr) {
    if (api_->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
      forget_error();
      return false;
    }
    return t.ndim <= kMostDims;
  }
  const OwnedObject description(PyObject_CallOneArg(describe_.get(), tensor));
  if (!description) {
    forget_error();
    return false;
  }
  unsigned long long address = 0;
  int code = 0;
  int bits = 0;
  PyObject* shape = nullptr;
  PyObject* strides = nullptr;
  bool good = PyArg_ParseTuple(description.get(), "KiiiiOO", &address, &t.device.device_type,
                               &t.device.device_id, &code, &bits, &shape, &strides) &&
              PyTuple_Check(shape) && PyTuple_Check(strides) &&
              PyTuple_GET_SIZE(shape) == PyTuple_GET_SIZE(strides) &&
              PyTuple_GET_SIZE(shape) <= kMostDims;
  if (good) {
    t.data = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
    t.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    t.byte_offset = 0;
    t.ndim = static_cast<int32_t>(PyTuple_GET_SIZE(shape));
    std::vector<int64_t>& dims = kept->emplace_back(2 * static_cast<size_t>(t.ndim));
    t.shape = dims.data();
    t.strides = dims.data() + t.ndim;
    for (int32_t i = 0; i < t.ndim; ++i) {
      t.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      t.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    good = PyErr_Occurred() == nullptr;
  }
  forget_error();
  return good;
}

// Puts operands into the bucket of their device and kind, which mostly is the one used last.
class TensorReader::Sorter {
 public:
  Sorter(std::vector<Bucket>* buckets, Py_ssize_t count) : buckets_(buckets), count_(count) {}

  void add(const dlpack::Device& device, Kind kind, const Operands& operands) {
    const auto belongs = [&](const Bucket& b) {
      return b.kind == kind && b.device_type == device.device_type &&
             b.device_id == device.device_id;
    };
    if (last_ >= buckets_->size() || !belongs((*buckets_)[last_])) {
      const auto found = std::find_if(buckets_->begin(), buckets_->end(), belongs);
      last_ = static_cast<size_t>(found - buckets_->begin());
      if (found == buckets_->end()) {
        buckets_->push_back({device.device_type, device.device_id, kind, {}});
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

namespace {

// Asks for the lines of a tensor that is read soon: in a training step, which has been through
// hundreds of megabytes since the last time, none is in the caches. What is asked for is the Python
// object and, where it is closer, what its first word points to, which with torch is the tensor of
// C++. Only a hint: were it something else, the lines would come for nothing. (Inline by force, as
// GCC drops the call of a function that does nothing but this.)
[[gnu::always_inline]] inline void fetch_ahead(PyObject* const* tensors, Py_ssize_t i,
                                               Py_ssize_t end) {
  constexpr Py_ssize_t kFar = 8;
  constexpr Py_ssize_t kNear = 4;
  constexpr int kLine = 64;
  constexpr int kLines = 4;  // a c10::TensorImpl takes some 200 bytes
  if (i + kFar < end && tensors[i + kFar] != nullptr) __builtin_prefetch(tensors[i + kFar]);
  if (i + kNear >= end || tensors[i + kNear] == nullptr) return;
  const PyObject* const object = tensors[i + kNear];
  if (Py_TYPE(object)->tp_basicsize < static_cast<Py_ssize_t>(sizeof(PyObject) + sizeof(void*))) {
    return;
  }
  const char* behind = nullptr;
  std::memcpy(&behind, object + 1, sizeof behind);
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(behind + line * kLine);
}

}  // namespace

// Operands on their way into buckets, some at a time: so few that they stay in the caches.
//
// They are read in passes, each of which makes one kind of call for all of them. Torch's calls run
// through much code, and through different code: taken in turn for one parameter after the other,
// the same calls take half as long again, as the processor forgets each before it comes back.
class TensorReader::Block {
 public:
  static constexpr Py_ssize_t kMost = 128;
  static constexpr int kTensors = 4;  // of a parameter: itself, gradient, momentum, master

  explicit Block(const TensorReader& reader) : reader_(reader) {}

  bool full() const { return size_ == kMost; }

  // The tensors are borrowed, and null where there is none.
  void add(PyObject* param, PyObject* grad, PyObject* momentum, PyObject* master) {
    PyObject* const tensors[] = {param, grad, momentum, master};
    for (int t = 0; t < kTensors; ++t) tensors_[t][size_] = tensors[t];
    ++size_;
  }

  // Reads what was added, sorts what fits into buckets and forgets it. `first`: the index of the
  // first that was added, among all. Returns how many there were.
  Py_ssize_t read(Py_ssize_t first, int64_t* zeros, Sorter* sorter, std::vector<Misfit>* misfits);

 private:
  void look_at_types();
  void look_for_negation();
  void look_at_memory(int t);
  Unfit compare(Py_ssize_t i, Kind* kind, Operands* out) const;

  const TensorReader& reader_;
  Py_ssize_t size_ = 0;
  PyObject* tensors_[kTensors][kMost];
  View views_[kTensors][kMost];
  Unfit reasons_[kMost];
  Dims dims_;
};

void TensorReader::Block::look_at_types() {
  for (Py_ssize_t i = 0; i < size_; ++i) {
    reasons_[i] = Unfit::fit;
    for (const auto& column : tensors_) {
      if (column[i] != nullptr && !reader_.plain(column[i])) reasons_[i] = Unfit::type;
    }
  }
}

// DLPack doesn't tell of lazy negation. Of gradients alone it is asked: each question takes 60 ns,
// and a parameter or state has been looked at when it came (ProxSGD's constructor,
// load_state_dict). Were it swapped for a lazily negated view later, that view would hardly get
// here: views of complex numbers, the public way to one, aren't dense unless they have one element.
void TensorReader::Block::look_for_negation() {
  for (Py_ssize_t i = 0; i < size_; ++i) {
    if (reasons_[i] != Unfit::fit) continue;
    fetch_ahead(tensors_[1], i, size_);
    PyObject* negated = reader_.negated(tensors_[1][i]);
    Py_XDECREF(negated);  // what Python knows as True and False outlives us
    if (negated == nullptr) forget_error();
    if (negated != Py_False) {
      reasons_[i] = negated == Py_True ? Unfit::negated : Unfit::unreadable;
    }
  }
}

void TensorReader::Block::look_at_memory(int t) {
  for (Py_ssize_t i = 0; i < size_; ++i) {
    if (reasons_[i] != Unfit::fit || tensors_[t][i] == nullptr) continue;
    fetch_ahead(tensors_[t], i, size_);
    if (!reader_.view(tensors_[t][i], &views_[t][i], &dims_)) reasons_[i] = Unfit::unreadable;
  }
}

// Compares what was read of one parameter's tensors.
Unfit TensorReader::Block::compare(Py_ssize_t i, Kind* kind, Operands* out) const {
  const View& p = views_[0][i];
  const dlpack::Device device = p.tensor.device;
  if (device.device_type != dlpack::kCPU && device.device_type != dlpack::kCUDA) {
    return Unfit::device;
  }
  DType dtypes[kTensors];
  void* data[kTensors] = {p.data(), nullptr, nullptr, nullptr};
  if (!our_dtype(p.tensor.dtype, &dtypes[0])) return Unfit::dtype;
  bool same_layout = true;
  bool readable = p.tensor.data != nullptr;
  for (int t = 1; t < kTensors; ++t) {
    if (tensors_[t][i] == nullptr) continue;
    const View& v = views_[t][i];
    if (!our_dtype(v.tensor.dtype, &dtypes[t]) || !p.same_device(v) || !p.same_shape(v)) {
      return Unfit::mixed;
    }
    same_layout = same_layout && p.same_layout(v);
    readable = readable && v.tensor.data != nullptr;
    data[t] = v.data();
  }
  if (!kind_of(dtypes[0], dtypes[1], tensors_[2][i] ? &dtypes[2] : nullptr,
               tensors_[3][i] ? &dtypes[3] : nullptr, kind)) {
    return Unfit::mixed;
  }
  const int64_t numel = p.numel();
  *out = {data[0], data[1], data[2], data[3], numel, nullptr};
  if (numel == 0) return Unfit::fit;
  if (!p.dense()) return Unfit::not_dense;
  if (!same_layout) return Unfit::layout;
  if (!readable) return Unfit::unreadable;
  if (device.device_type == dlpack::kCUDA && !cuda::why_unusable(device.device_id).empty()) {
    return Unfit::no_cuda;
  }
  return Unfit::fit;
}

Py_ssize_t TensorReader::Block::read(Py_ssize_t first, int64_t* zeros, Sorter* sorter,
                                     std::vector<Misfit>* misfits) {
  look_at_types();
  look_for_negation();
  for (int t = 0; t < kTensors; ++t) look_at_memory(t);
  for (Py_ssize_t i = 0; i < size_; ++i) {
    Kind kind{};
    Operands operands{};
    const Unfit reason = reasons_[i] == Unfit::fit ? compare(i, &kind, &operands) : reasons_[i];
    if (reason != Unfit::fit) {
      misfits->push_back({first + i, reason});
      continue;
    }
    if (operands.numel == 0) continue;  // nothing to do, wherever it is
    if (zeros != nullptr) operands.zeros = zeros + first + i;
    sorter->add(views_[0][i].tensor.device, kind, operands);
  }
  dims_.clear();
  return std::exchange(size_, 0);
}

Reading TensorReader::read(PyObject* params, PyObject* grads, PyObject* momenta, PyObject* masters,
                           int64_t* zeros) const {
  Reading reading;
  // Copies: other threads may change the lists wherever torch lets them run.
  PyObject* const lists[] = {params, grads, momenta, masters};
  for (int t = 0; t < Block::kTensors; ++t) {
    if (lists[t] == Py_None) continue;
    reading.owners[t] = copy_of(lists[t]);
    if (!reading.owners[t]) throw std::bad_alloc();
  }
  const Py_ssize_t count = PyList_GET_SIZE(reading.owners[0].get());
  for (const OwnedObject& list : reading.owners) {
    if (list && PyList_GET_SIZE(list.get()) != count) {
      throw std::invalid_argument("the lists must be of one length");
    }
  }
  const auto item = [&](int t, Py_ssize_t i) {
    PyObject* const list = reading.owners[t].get();
    return list == nullptr ? nullptr : PyList_GET_ITEM(list, i);
  };
  Sorter sorter(&reading.buckets, count);
  Block block(*this);
  Py_ssize_t first = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    block.add(item(0, i), item(1, i), item(2, i), item(3, i));
    if (block.full() || i + 1 == count) {
      first += block.read(first, zeros, &sorter, &reading.misfits);
    }
  }
  return reading;
}

std::optional<Gathered> TensorReader::gather(PyObject* params, PyObject* state, bool with_momenta,
                                             bool with_masters, int64_t* zeros,
                                             Py_ssize_t* position) const {
  const auto nothing = [] {
    forget_error();
    return std::nullopt;
  };
  // A copy, as other threads may change the list wherever torch or a hash lets them run. Those
  // without a gradient are taken out of it on the way.
  Gathered gathered{copy_of(params), OwnedObject(), OwnedObject(), OwnedObject(), Reading{}};
  if (!gathered.params) return nothing();
  params = gathered.params.get();
  const Py_ssize_t count = PyList_GET_SIZE(params);
  gathered.grads = new_list(count);
  if (with_momenta) gathered.momenta = new_list(count);
  if (with_masters) gathered.masters = new_list(count);
  OwnedObject* const lists[] = {&gathered.params, &gathered.grads, &gathered.momenta,
                                &gathered.masters};
  if (!gathered.grads || (with_momenta && !gathered.momenta) ||
      (with_masters && !gathered.masters)) {
    return nothing();
  }
  View near;  // the parameter on whose device the counters are
  Dims dims;
  if (zeros != nullptr && count > 0 &&
      !(plain(PyList_GET_ITEM(params, 0)) && view(PyList_GET_ITEM(params, 0), &near, &dims))) {
    return nothing();
  }
  Sorter sorter(&gathered.reading.buckets, count);
  Block block(*this);
  Py_ssize_t here = *position;
  Py_ssize_t taken = 0;
  for (Py_ssize_t begin = 0; begin < count; begin += Block::kMost) {
    const Py_ssize_t end = std::min(count, begin + Block::kMost);
    PyObject* const* const all = reinterpret_cast<PyListObject*>(params)->ob_item;
    std::array<OwnedObject, Block::kMost> grads;
    for (Py_ssize_t i = begin; i < end; ++i) {
      if (!plain(all[i])) return nothing();
      fetch_ahead(all, i, end);
      OwnedObject& grad = grads[static_cast<size_t>(i - begin)];
      grad = OwnedObject(grad_of(all[i]));
      if (!grad) return nothing();
    }
    Py_ssize_t added = 0;
    for (Py_ssize_t i = begin; i < end; ++i) {
      PyObject* const param = PyList_GET_ITEM(params, i);
      OwnedObject& grad = grads[static_cast<size_t>(i - begin)];
      const bool has_grad = grad.get() != Py_None;
      PyObject* of_param = nullptr;
      if (with_momenta || with_masters) {
        PyObject* next = nullptr;
        Py_ssize_t after = here;
        if (PyDict_Next(state, &after, &next, &of_param) && next == param) {
          here = after;
        } else {
          of_param = has_grad ? PyDict_GetItemWithError(state, param) : nullptr;
        }
      }
      if (!has_grad) continue;
      const auto of_state = [&](const OwnedObject& name) {
        const bool known = of_param != nullptr && PyDict_CheckExact(of_param);
        return known ? PyDict_GetItemWithError(of_param, name.get()) : nullptr;
      };
      PyObject* const momentum = with_momenta ? of_state(momentum_name_) : nullptr;
      PyObject* const master = with_masters ? of_state(master_name_) : nullptr;
      if ((with_momenta && momentum == nullptr) || (with_masters && master == nullptr)) {
        return nothing();
      }
      block.add(param, grad.get(), momentum, master);
      const Py_ssize_t place = taken + added;
      // Shared before anything is given up, which may run code that changes the state.
      OwnedObject owned[] = {OwnedObject(), std::move(grad), share(momentum), share(master)};
      if (place != i) PyList_SetItem(params, place, share(param).release());
      for (int t = 1; t < Block::kTensors; ++t) {
        if (*lists[t]) PyList_SET_ITEM(lists[t]->get(), place, owned[t].release());
      }
      ++added;
    }
    block.read(taken, zeros, &sorter, &gathered.reading.misfits);
    if (!gathered.reading.misfits.empty()) return nothing();
    taken += added;
  }
  for (OwnedObject* list : lists) {
    if (*list && PyList_SetSlice(list->get(), taken, count, nullptr) != 0) return nothing();
    if (*list && list != &gathered.params) PyObject_GC_Track(list->get());
  }
  for (const Bucket& bucket : gathered.reading.buckets) {
    const dlpack::Device& counters = near.tensor.device;
    if (zeros != nullptr &&
        (bucket.device_type != counters.device_type || bucket.device_id != counters.device_id)) {
      return nothing();
    }
  }
  for (int t = 0; t < Block::kTensors; ++t) gathered.reading.owners[t] = share(lists[t]->get());
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
  forget_error();
  if (!told) throw std::runtime_error("ProxSGD: torch did not tell its current stream");
  return stream;
}

}  // namespace prox_sgd
