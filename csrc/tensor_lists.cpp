#include "tensor_lists.h"

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace prox_sgd {

namespace {

enum Role : size_t { kParam, kGrad, kMomentumBuffer, kMasterParam, kStart, kRoles };

// The tensors of one parameter, null where there is none, with their descriptions.
struct Row {
  std::array<py::handle, kRoles> tensors;
  std::array<TensorView, kRoles> views;
};

// The storage of tensors with these dtypes; null where a parameter has no such tensor.
bool storage_of(DType param, DType grad, const DType* momentum, const DType* master, Storage* out) {
  if (grad != param) return false;
  if (master == nullptr) {
    if (momentum == nullptr || *momentum == param) {
      *out = static_cast<Storage>(param);  // numbered alike
      return true;
    }
    *out = Storage::float32_momentum_bfloat16;
    return param == DType::float32 && *momentum == DType::bfloat16;
  }
  if (*master != DType::float32) return false;
  const bool float32_momentum = momentum == nullptr || *momentum == DType::float32;
  if (param == DType::bfloat16 && float32_momentum) {
    *out = Storage::bfloat16_master;
  } else if (param == DType::bfloat16 && *momentum == DType::bfloat16) {
    *out = Storage::bfloat16_master_momentum_bfloat16;
  } else if (param == DType::float16 && float32_momentum) {
    *out = Storage::float16_master;
  } else {
    return false;
  }
  return true;
}

// Whether devices can be used; each is asked about once.
class Devices {
 public:
  explicit Devices(cpu::Simd simd) : simd_(simd) {}

  Reason why_unusable(const dlpack::Device& device) {
    const auto [found, is_new] = known_.try_emplace({device.device_type, device.device_id});
    if (is_new) found->second = find_out(device);
    return found->second;
  }

 private:
  Reason find_out(const dlpack::Device& device) const {
    if (device.device_type == dlpack::kCUDA) {
      return cuda::why_unusable(device.device_id).empty() ? Reason::fits : Reason::no_cuda;
    }
    return cpu::why_unusable(simd_).empty() ? Reason::fits : Reason::no_cpu;
  }

  cpu::Simd simd_;
  std::map<std::pair<int32_t, int32_t>, Reason> known_;
};

// Compares the tensors of one parameter, all of which have been described.
Reason compare(const Row& row, Devices& devices, Storage* storage, Operands* out) {
  const TensorView& p = row.views[kParam];
  const int32_t device_type = p.tensor.device.device_type;
  if (device_type != dlpack::kCPU && device_type != dlpack::kCUDA) return Reason::device;
  std::array<DType, kRoles> dtypes{};
  if (!p.dtype(&dtypes[kParam])) return Reason::dtype;
  std::array<void*, kRoles> data{};
  bool same_layout = true;
  bool has_memory = true;
  for (size_t role = 0; role < kRoles; ++role) {
    if (!row.tensors[role]) continue;
    const TensorView& view = row.views[role];
    if (!view.dtype(&dtypes[role]) || !p.same_device(view) || !p.same_shape(view)) {
      return Reason::mixed;
    }
    same_layout = same_layout && p.same_layout(view);
    has_memory = has_memory && view.tensor.data != nullptr;
    data[role] = view.data();
  }
  const auto dtype_of = [&](Role role) { return row.tensors[role] ? &dtypes[role] : nullptr; };
  if (!storage_of(dtypes[kParam], dtypes[kGrad], dtype_of(kMomentumBuffer), dtype_of(kMasterParam),
                  storage)) {
    return Reason::mixed;
  }
  const Role weight = row.tensors[kMasterParam] ? kMasterParam : kParam;
  if (row.tensors[kStart] && dtypes[kStart] != dtypes[weight]) return Reason::mixed;
  *out = {data[kParam], data[kGrad], data[kMomentumBuffer], data[kMasterParam], data[kStart],
          p.numel(),    nullptr};
  if (out->numel == 0) return Reason::fits;
  if (!p.is_dense()) return Reason::not_dense;
  if (!has_memory) return Reason::unreadable;
  const Reason unusable = devices.why_unusable(p.tensor.device);
  if (unusable != Reason::fits) return unusable;
  return same_layout ? Reason::fits : Reason::layout;  // the last: see Reason
}

std::string in_words(Reason reason, cpu::Simd simd) {
  switch (reason) {
    case Reason::fits:
      return "fits";
    case Reason::subclass:
      return "it is a subclass of torch.Tensor";
    case Reason::unreadable:
      return "its memory can't be read";
    case Reason::device:
      return "it is neither on a CPU nor on a CUDA device";
    case Reason::dtype:
      return "its dtype is none of float32, float64, bfloat16 and float16";
    case Reason::mixed:
      return "its gradient, momentum buffer, master weight or start has another shape, device or "
             "dtype";
    case Reason::not_dense:
      return "it is not dense: it has gaps, overlaps or repeats in memory";
    case Reason::shared:
      return "it shares memory with another parameter";
    case Reason::no_cuda:
      return "its CUDA device can't be used";
    case Reason::no_cpu:
      return cpu::why_unusable(simd);
    default:
      return "its gradient, momentum buffer, master weight or start has another memory layout";
  }
}

// A parameter that a kernel can take.
struct Fitting {
  int64_t index;
  dlpack::Device device;
  Storage storage;
  Operands operands;
  uintptr_t begin;  // its parameter's memory
  uintptr_t end;
};

// Marks parameters that overlap another one in memory. All are dense, so their spans tell.
std::vector<bool> find_shared(const std::vector<Fitting>& fitting) {
  std::vector<const Fitting*> order;
  order.reserve(fitting.size());
  for (const Fitting& f : fitting) order.push_back(&f);
  std::sort(order.begin(), order.end(), [](const Fitting* a, const Fitting* b) {
    return std::tie(a->device.device_type, a->device.device_id, a->begin) <
           std::tie(b->device.device_type, b->device.device_id, b->begin);
  });
  std::vector<bool> shared(fitting.size());
  const auto mark = [&](const Fitting* f) {
    shared[static_cast<size_t>(f - fitting.data())] = true;
  };
  const Fitting* farthest = nullptr;  // of those before on the same device: the one that ends last
  for (const Fitting* f : order) {
    const bool same_device = farthest != nullptr &&
                             farthest->device.device_type == f->device.device_type &&
                             farthest->device.device_id == f->device.device_id;
    if (same_device && f->begin < farthest->end) {
      mark(f);
      mark(farthest);
    }
    if (!same_device || f->end > farthest->end) farthest = f;
  }
  return shared;
}

// Adds a parameter to the batch of its device and storage.
void add(std::vector<Batch>& batches, const Fitting& f) {
  const auto belongs = [&](const Batch& batch) {
    return batch.storage == f.storage && batch.device.device_type == f.device.device_type &&
           batch.device.device_id == f.device.device_id;
  };
  const auto found = std::find_if(batches.begin(), batches.end(), belongs);
  Batch& batch =
      found == batches.end() ? batches.emplace_back(Batch{f.device, f.storage, {}, {}}) : *found;
  batch.operands.push_back(f.operands);
  batch.indices.push_back(f.index);
}

}  // namespace

TensorReader::TensorReader(TensorDescriber describer, py::object tensor_type,
                           py::object parameter_type)
    : describer_(std::move(describer)),
      tensor_type_(std::move(tensor_type)),
      parameter_type_(std::move(parameter_type)) {}

bool TensorReader::is_plain(py::handle tensor) const {
  const auto type = py::type::handle_of(tensor);
  return type.is(tensor_type_) || type.is(parameter_type_);
}

Reading TensorReader::read(const py::list& params, const py::list& grads,
                           const std::optional<py::list>& momentum_buffers,
                           const std::optional<py::list>& master_params,
                           const std::optional<py::list>& starts, int64_t* num_zeros) const {
  Reading reading;
  const cpu::Simd simd = cpu::simd_level();  // which another thread may set
  Devices devices(simd);
  std::array<py::handle, kRoles> columns;
  const std::array<const py::list*, kRoles> given = {
      &params, &grads, momentum_buffers ? &*momentum_buffers : nullptr,
      master_params ? &*master_params : nullptr, starts ? &*starts : nullptr};
  for (size_t role = 0; role < kRoles; ++role) {
    if (given[role] == nullptr) continue;
    // A copy: describing a tensor may run Python code that changes the caller's lists.
    reading.tensors.push_back(
        py::reinterpret_steal<py::list>(PyList_GetSlice(given[role]->ptr(), 0, PY_SSIZE_T_MAX)));
    columns[role] = reading.tensors.back();
    if (!columns[role]) throw py::error_already_set();
    if (reading.tensors.back().size() != reading.tensors.front().size()) {
      throw std::invalid_argument("the lists must be of one length");
    }
  }
  Row row;
  const auto describe = [&](Py_ssize_t i) {
    for (size_t role = 0; role < kRoles; ++role) {
      row.tensors[role] = columns[role] ? PyList_GET_ITEM(columns[role].ptr(), i) : nullptr;
    }
    for (const py::handle tensor : row.tensors) {
      if (tensor && !is_plain(tensor)) return Reason::subclass;
    }
    for (size_t role = 0; role < kRoles; ++role) {
      const py::handle tensor = row.tensors[role];
      if (tensor && !describer_.view(tensor, &row.views[role])) return Reason::unreadable;
    }
    return Reason::fits;
  };
  const auto count = static_cast<Py_ssize_t>(reading.tensors.front().size());
  std::vector<Fitting> fitting;
  fitting.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    Storage storage{};
    Operands operands{};
    Reason reason = describe(i);
    if (reason == Reason::fits) reason = compare(row, devices, &storage, &operands);
    if (reason != Reason::fits) {
      reading.rejections.push_back({i, reason, in_words(reason, simd)});
    } else if (operands.numel > 0) {
      if (num_zeros != nullptr) operands.num_zeros = num_zeros + i;
      const dlpack::Tensor& param = row.views[kParam].tensor;
      const auto begin = reinterpret_cast<uintptr_t>(operands.param);
      const auto bytes = static_cast<uintptr_t>(operands.numel) * (param.dtype.bits / 8);
      fitting.push_back({i, param.device, storage, operands, begin, begin + bytes});
    }
  }
  const std::vector<bool> shared = find_shared(fitting);
  for (size_t n = 0; n < fitting.size(); ++n) {
    const Fitting& f = fitting[n];
    if (shared[n]) {
      reading.rejections.push_back({f.index, Reason::shared, in_words(Reason::shared, simd)});
    } else {
      add(reading.batches, f);
    }
  }
  const auto by_index = [](const Rejection& a, const Rejection& b) { return a.index < b.index; };
  std::sort(reading.rejections.begin(), reading.rejections.end(), by_index);
  return reading;
}

}  // namespace prox_sgd
