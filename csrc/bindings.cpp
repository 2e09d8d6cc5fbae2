// resnet_reg_ext._C: the native core as Python sees it. No torch header, no torch library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "build_info.h"
#include "prox_sgd.h"
#include "row_bindings.h"
#include "steps.h"
#include "tensor_lists.h"

namespace py = pybind11;
using namespace prox_sgd;

namespace {

// ---- structs whose fields are keyword arguments -------------------------------------------------

template <typename T>
void assign(T& field, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    field = reinterpret_cast<T>(value.cast<Address>());
  } else if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(value.cast<std::underlying_type_t<T>>());
  } else {
    field = value.cast<T>();
  }
}

// Throws TypeError for an unknown name, a value of another type and, where all fields are required,
// a missing name.
template <typename Struct>
Struct from_keywords(const py::kwargs& given, bool all_required) {
  Struct made{};
  std::set<std::string> known;
  Struct::for_each_field([&](const char* name, auto field) {
    const py::handle value = PyDict_GetItemString(given.ptr(), name);
    if (!value) {
      if (all_required) throw py::type_error(std::string("missing keyword argument: ") + name);
      return;
    }
    known.insert(name);
    try {
      assign(made.*field, value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + ": " + py::repr(value).cast<std::string>() +
                           " is of another type");
    }
  });
  if (known.size() == given.size()) return made;
  for (const auto& [name, value] : given) {
    if (known.count(py::str(name)) == 0) {
      throw py::type_error("unknown keyword argument: " + std::string(py::str(name)));
    }
  }
  return made;
}

template <typename Struct>
void bind_keywords(py::module_& m, const char* name, const char* doc, bool all_required) {
  py::class_<Struct> type(m, name, doc);
  type.def(py::init([all_required](const py::kwargs& given) {
    return from_keywords<Struct>(given, all_required);
  }));
  Struct::for_each_field([&](const char* field_name, auto field) {
    type.def_property_readonly(field_name, [field](const Struct& self) {
      using Field = std::decay_t<decltype(self.*field)>;
      if constexpr (std::is_pointer_v<Field>) {
        return reinterpret_cast<Address>(self.*field);
      } else if constexpr (std::is_enum_v<Field>) {
        return static_cast<std::underlying_type_t<Field>>(self.*field);
      } else {
        return self.*field;
      }
    });
  });
}

// ---- SIMD levels by name ------------------------------------------------------------------------

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const cpu::Simd level : cpu::simd_levels()) names.emplace_back(cpu::name_of(level));
  return names;
}

void set_simd_level(const std::string& name) {
  std::string known;
  for (const cpu::Simd level : cpu::simd_levels()) {
    if (name == cpu::name_of(level)) {
      cpu::set_simd_level(level);
      return;
    }
    known += (known.empty() ? "'" : " or '") + std::string(cpu::name_of(level)) + "'";
  }
  throw std::invalid_argument("SIMD level '" + name + "' is unknown: this processor has " + known);
}

// ---- a step ------------------------------------------------------------------------------------

// All buckets of one storage on one CUDA device: as few launches as their tables allow.
struct CudaStep {
  dlpack::Device device;
  Storage storage;
  std::vector<cuda::Bucket> buckets;
  std::vector<cuda::Launch> launches;
  void* stream;
};

std::vector<CudaStep> cuda_steps(const TensorReader& reader, const std::vector<Step>& steps) {
  std::map<std::pair<int32_t, Storage>, CudaStep> by_kind;
  for (const Step& step : steps) {
    for (const Batch& batch : step.reading.batches) {
      if (batch.device.device_type != dlpack::kCUDA) continue;
      CudaStep& kind = by_kind[{batch.device.device_id, batch.storage}];
      kind.device = batch.device;
      kind.storage = batch.storage;
      const auto values = values_on(step.device_values, batch.device.device_id);
      kind.buckets.push_back({batch.operands, step.options, values});
    }
  }
  std::vector<CudaStep> planned;
  for (auto& [key, kind] : by_kind) {
    kind.launches = cuda::plan(kind.buckets, kind.storage);
    kind.stream = reader.describer().current_stream(kind.device);
    planned.push_back(std::move(kind));
  }
  return planned;
}

// `threads` is py::int_, which takes no object with __index__: no Python code may run between
// reading addresses and using them.
void run(const TensorReader& reader, const py::list& given, const py::int_& threads) {
  // All that can fail comes before the first change.
  const auto max_threads = threads.cast<int>();
  const std::vector<Step> steps = steps_from(given);
  const std::vector<CudaStep> on_cuda = cuda_steps(reader, steps);
  const py::gil_scoped_release release;
  for (const CudaStep& step : on_cuda) {
    cuda::launch(step.launches, step.storage, step.device.device_id, step.stream);
  }
  for (const Step& step : steps) {
    for (const Batch& batch : step.reading.batches) {
      if (batch.device.device_type != dlpack::kCPU) continue;
      cpu::prox_sgd(batch.operands, batch.storage, step.options, max_threads);
    }
  }
}

py::list plan_cuda(
    const std::string& storage,
    const std::vector<std::tuple<std::vector<AddressRow>, Options, cuda::DeviceValues>>& given,
    int64_t capacity) {
  std::vector<std::vector<Operands>> operands;
  std::vector<cuda::Bucket> buckets;
  for (const auto& bucket : given) operands.push_back(operands_from(std::get<0>(bucket)));
  for (size_t i = 0; i < given.size(); ++i) {
    buckets.push_back({operands[i], std::get<1>(given[i]), std::get<2>(given[i])});
  }
  return described(cuda::plan(buckets, storage_named(storage), capacity));
}

py::dict build_info() {
  py::dict info;
  info["version"] = PROX_SGD_VERSION;
  info["compiler"] = PROX_SGD_COMPILER;
  info["sanitizers"] = PROX_SGD_SANITIZERS;
  info["cuda_toolkit"] = cuda::toolkit_version();
  info["cuda_architectures"] = PROX_SGD_CUDA_ARCHITECTURES;
  info["cuda_flags"] = PROX_SGD_CUDA_FLAGS;
  info["cuda_left_out_because"] = PROX_SGD_CUDA_LEFT_OUT;
  return info;
}

void bind_reader(py::module_& m) {
  py::class_<Rejection>(m, "Rejection", "A parameter that the kernels can't take as it is.")
      .def_readonly("index", &Rejection::index, "Its place in the lists.")
      .def_property_readonly(
          "layout_only", [](const Rejection& r) { return r.reason == Reason::layout; },
          "Whether it fits once its gradient and state have its own memory layout.")
      .def_property_readonly(
          "cuda_unusable", [](const Rejection& r) { return r.reason == Reason::no_cuda; },
          "Whether the reason is a CUDA device that this build can't use.")
      .def_property_readonly(
          "shared", [](const Rejection& r) { return r.reason == Reason::shared; },
          "Whether the reason is memory that it shares with another parameter.")
      .def_readonly("reason", &Rejection::in_words);

  py::class_<Reading>(m, "Reading", "Tensors that were read and checked; keeps them alive.")
      .def_readonly("misfits", &Reading::rejections);

  py::class_<TensorReader>(m, "TensorReader", "Reads lists of torch tensors through DLPack.")
      .def(py::init([](py::object exchange_api, py::object describe, py::object current_stream,
                       py::object tensor_type, py::object parameter_type) {
             return std::make_unique<TensorReader>(
                 TensorDescriber(std::move(exchange_api), std::move(describe),
                                 std::move(current_stream)),
                 std::move(tensor_type), std::move(parameter_type));
           }),
           py::arg("exchange_api").none(true), py::arg("describe"), py::arg("current_stream"),
           py::arg("tensor_type"), py::arg("parameter_type"))
      .def_property_readonly(
          "has_exchange_api",
          [](const TensorReader& reader) { return reader.describer().has_exchange_api(); })
      .def(
          "read",
          [](const TensorReader& reader, const py::list& params, const py::list& grads,
             const std::optional<py::list>& momentum_buffers,
             const std::optional<py::list>& master_params, Address num_zeros,
             const std::optional<py::list>& starts) {
            return reader.read(params, grads, momentum_buffers, master_params, starts,
                               reinterpret_cast<int64_t*>(num_zeros));
          },
          py::arg("params"), py::arg("grads"), py::arg("momentum_buffers").none(true),
          py::arg("master_params").none(true), py::arg("num_zeros"), py::arg("starts") = py::none(),
          "`num_zeros`: the address of an int64 counter a parameter, on the parameters' one "
          "device; 0 counts nothing.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of resnet_reg_ext: the fused ProxSGD step on CPU and CUDA.";

  bind_keywords<Options>(
      m, "Options", "A parameter group's options; all are keyword arguments, and all required.",
      true);
  bind_keywords<cuda::DeviceValues>(
      m, "DeviceValues",
      "Addresses in a CUDA device's memory, 0 for none: lr and l1, of the types that lr_dtype and "
      "l1_dtype number (storage.h), grad_scale, grad_coefficient and found_inf (float32).",
      false);
  bind_reader(m);
  bind_rows(m);

  m.def("prox_sgd_", &run, py::arg("reader"), py::arg("steps"), py::arg("threads"),
        "One step on all tensors of readings, in place. `steps`: tuples of a reading, its options "
        "and a dict, CUDA device index -> DeviceValues.");

  m.def("plan_prox_sgd_cuda", &plan_cuda, py::arg("storage"), py::arg("buckets"),
        py::arg("capacity") = 0,
        "The launches for buckets of (rows, Options, DeviceValues), where a row is addresses of "
        "parameter, gradient, momentum buffer, master, start and zero counter, and the number of "
        "elements: kernel, grid, block and parameter bytes of each. Needs no GPU and no CUDA "
        "build.");

  m.attr("storages") = [] {
    py::list names;
    for (const char* name : kStorageNames) names.append(name);
    return py::tuple(names);
  }();

  m.def("build_info", &build_info, "What this binary was built from.");
  m.def("simd_levels", &simd_levels, "SIMD levels that this processor can run, slowest first.");
  m.def(
      "simd_level", [] { return cpu::name_of(cpu::simd_level()); },
      "The SIMD level in use; 'none' leaves all steps to pure PyTorch.");
  m.def("set_simd_level", &set_simd_level, py::arg("name"));
  m.def("openmp_runtime", &cpu::openmp_runtime, "The OpenMP library in use, or 'none'.");
  m.def(
      "why_cpu_unusable", [] { return cpu::why_unusable(cpu::simd_level()); },
      "Why the kernel for CPUs can't be used; empty where it can.");
  m.def("why_cuda_unusable", &cuda::why_unusable, py::arg("device"),
        "Why CUDA device `device` can't be used; empty where it can.");
  m.def("cuda_driver_version", &cuda::driver_version,
        "The CUDA version that the installed driver supports, as 12040 for 12.4; 0 without a "
        "driver or without CUDA in this build.");
}
