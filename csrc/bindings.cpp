// resnet_reg_ext._C: the native core as Python sees it. No torch header, no torch library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cuda/plan.h"
#include "prox_sgd.h"
#include "tensors.h"

namespace py = pybind11;
using namespace prox_sgd;

namespace {

cpu::Simd simd_level = cpu::simd_supported(cpu::Simd::avx2) ? cpu::Simd::avx2 : cpu::Simd::baseline;

const char* name_of(cpu::Simd level) { return level == cpu::Simd::avx2 ? "avx2" : "baseline"; }

std::vector<std::string> simd_levels() {
  std::vector<std::string> levels;
  for (const cpu::Simd level : {cpu::Simd::baseline, cpu::Simd::avx2}) {
    if (cpu::simd_supported(level)) levels.emplace_back(name_of(level));
  }
  return levels;
}

void set_simd_level(const std::string& name) {
  for (const cpu::Simd level : {cpu::Simd::baseline, cpu::Simd::avx2}) {
    if (name != name_of(level)) continue;
    if (!cpu::simd_supported(level)) {
      throw std::invalid_argument("SIMD level '" + name + "' is not supported by this processor");
    }
    simd_level = level;
    return;
  }
  throw std::invalid_argument("SIMD level '" + name + "' is unknown: 'baseline' or 'avx2'");
}

Kind kind_named(const std::string& name) {
  int number = 0;
  for (const char* known : kKindNames) {
    if (name == known) return static_cast<Kind>(number);
    ++number;
  }
  throw std::invalid_argument("kind '" + name + "' is unknown");
}

using Address = std::uintptr_t;

// lr, l1, grad_scale, grad_coefficient, found_inf: where device memory holds them; 0 for nowhere.
using Addresses = std::array<Address, 5>;

cuda::DeviceValues device_values(const Addresses& at) {
  return {reinterpret_cast<const double*>(at[0]), reinterpret_cast<const double*>(at[1]),
          reinterpret_cast<const float*>(at[2]), reinterpret_cast<const float*>(at[3]),
          reinterpret_cast<const float*>(at[4])};
}

void run(const TensorReader& reader, const Reading& reading, double lr, double momentum,
         double dampening, double weight_decay, double l1, bool nesterov, bool maximize,
         bool proximal, bool frozen_zeros, float grad_scale, float grad_coefficient, bool first,
         int threads, const std::map<int, Addresses>& device) {
  const Options o{lr,       momentum,     dampening,  weight_decay,     l1,   nesterov, maximize,
                  proximal, frozen_zeros, grad_scale, grad_coefficient, first};
  for (const Bucket& bucket : reading.buckets) {
    if (bucket.device_type == dlpack::kCUDA) {
      void* stream = reader.current_stream(bucket.device_type, bucket.device_id);
      const auto found = device.find(bucket.device_id);
      const auto values =
          found == device.end() ? cuda::DeviceValues{} : device_values(found->second);
      const py::gil_scoped_release release;
      cuda::prox_sgd(bucket.operands, bucket.kind, o, values, bucket.device_id, stream);
    } else {
      const cpu::Simd level = simd_level;  // which another thread may set
      const py::gil_scoped_release release;
      cpu::prox_sgd(bucket.operands, bucket.kind, o, level, threads);
    }
  }
}

// Addresses of parameter, gradient, momentum, master and zero counter (0 for none), and elements.
using Row = std::tuple<Address, Address, Address, Address, Address, int64_t>;

py::list plan_cuda(const std::string& kind, const std::vector<Row>& rows, double lr,
                   double momentum, double dampening, double weight_decay, double l1, bool nesterov,
                   bool maximize, bool proximal, bool frozen_zeros, float grad_scale,
                   float grad_coefficient, bool first, const Addresses& device, int64_t capacity) {
  const Options o{lr,       momentum,     dampening,  weight_decay,     l1,   nesterov, maximize,
                  proximal, frozen_zeros, grad_scale, grad_coefficient, first};
  std::vector<Operands> list;
  list.reserve(rows.size());
  for (const auto& [param, grad, buffer, master, zeros, numel] : rows) {
    if (numel < 0) throw std::invalid_argument("numel must not be negative");
    list.push_back({reinterpret_cast<void*>(param), reinterpret_cast<const void*>(grad),
                    reinterpret_cast<void*>(buffer), reinterpret_cast<void*>(master), numel,
                    reinterpret_cast<int64_t*>(zeros)});
  }
  py::list launches;
  for (const cuda::Launch& launch :
       cuda::plan(list, kind_named(kind), o, device_values(device), capacity)) {
    py::dict entry;
    entry["kernel"] = launch.kernel;
    entry["grid"] = launch.grid;
    entry["block"] = launch.block;
    entry["parameters"] = py::bytes(reinterpret_cast<const char*>(launch.parameters.data()),
                                    launch.parameters.size());
    launches.append(std::move(entry));
  }
  return launches;
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of resnet_reg_ext: the fused ProxSGD step on CPU and CUDA.";

  // The Python exception is still set.
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Interrupted&) {
    }
  });

  py::class_<Reading>(m, "Reading", "Tensors that were read and checked.")
      .def_property_readonly(
          "misfits",
          [](const Reading& reading) {
            py::list misfits;
            for (const Misfit& misfit : reading.misfits) {
              misfits.append(py::make_tuple(
                  misfit.index, misfit.reason == Unfit::layout, misfit.reason == Unfit::negated,
                  misfit.reason == Unfit::no_cuda, describe(misfit.reason)));
            }
            return misfits;
          },
          "(index, differs in layout only, has a negated gradient, lacks a usable CUDA device, "
          "reason in words) for each parameter that no bucket took.");

  py::class_<TensorReader>(m, "TensorReader", "Reads lists of torch tensors through DLPack.")
      .def(py::init([](py::object exchange_api, py::object describe, py::object stream,
                       py::object is_neg, py::object tensor_type, py::object parameter_type) {
             return std::make_unique<TensorReader>(exchange_api.ptr(), describe.ptr(), stream.ptr(),
                                                   is_neg.ptr(), tensor_type.ptr(),
                                                   parameter_type.ptr());
           }),
           py::arg("exchange_api").none(true), py::arg("describe"), py::arg("stream"),
           py::arg("is_neg"), py::arg("tensor_type"), py::arg("parameter_type"))
      .def_property_readonly("has_exchange_api", &TensorReader::has_exchange_api)
      .def(
          "read",
          [](const TensorReader& reader, py::list params, py::list grads,
             std::optional<py::list> momenta, std::optional<py::list> masters, Address zeros) {
            const auto list = [](const std::optional<py::list>& given) {
              return given ? given->ptr() : Py_None;
            };
            return reader.read(params.ptr(), grads.ptr(), list(momenta), list(masters),
                               reinterpret_cast<int64_t*>(zeros));
          },
          py::arg("params"), py::arg("grads"), py::arg("momenta").none(true),
          py::arg("masters").none(true), py::arg("zeros"))
      .def(
          "gather",
          [](const TensorReader& reader, py::list params, py::dict state, bool momenta,
             bool masters, Address zeros, Py_ssize_t position) -> py::object {
            auto found = reader.gather(params.ptr(), state.ptr(), momenta, masters,
                                       reinterpret_cast<int64_t*>(zeros), &position);
            if (!found) return py::none();
            const auto held = [](OwnedObject& list) -> py::object {
              if (!list) return py::none();
              return py::reinterpret_steal<py::object>(list.release());
            };
            return py::make_tuple(held(found->params), held(found->grads), held(found->momenta),
                                  held(found->masters), std::move(found->reading), position);
          },
          py::arg("params"), py::arg("state"), py::arg("momenta"), py::arg("masters"),
          py::arg("zeros"), py::arg("position"),
          "(params, grads, momenta, masters, reading, position) of the parameters that have a "
          "gradient; None where anything is out of the ordinary. `zeros`: the address of an int64 "
          "counter a parameter, on the first one's device; 0 for none. `position`: where in the "
          "state to look first; 0, then what is returned.");

  m.def(
      "prox_sgd_", &run, py::arg("reader"), py::arg("reading"), py::arg("lr"), py::arg("momentum"),
      py::arg("dampening"), py::arg("weight_decay"), py::arg("l1"), py::arg("nesterov"),
      py::arg("maximize"), py::arg("proximal"), py::arg("frozen_zeros"), py::arg("grad_scale"),
      py::arg("grad_coefficient"), py::arg("first"), py::arg("threads"), py::arg("device"),
      "One step on all buckets of a reading, in place. `device` maps CUDA devices to the "
      "addresses of lr, l1 (float64), grad_scale, grad_coefficient and found_inf (float32) there, "
      "0 for what isn't there.");

  m.def("plan_prox_sgd_cuda", &plan_cuda, py::arg("kind"), py::arg("rows"), py::arg("lr"),
        py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("l1"),
        py::arg("nesterov"), py::arg("maximize"), py::arg("proximal"), py::arg("frozen_zeros"),
        py::arg("grad_scale"), py::arg("grad_coefficient"), py::arg("first"),
        py::arg("device") = Addresses{}, py::arg("capacity") = 0,
        "The launches for rows of (addresses of parameter, gradient, momentum, master, zero "
        "counter; elements): kernel, grid, block and parameter bytes of each. Needs no GPU and no "
        "CUDA build.");

  m.attr("kinds") = [] {
    py::list names;
    for (const char* name : kKindNames) names.append(name);
    return py::tuple(names);
  }();

  m.def("build_info", &build_info, "What this binary was built from.");
  m.def("simd_levels", &simd_levels, "SIMD levels that this processor can run.");
  m.def("simd_level", [] { return name_of(simd_level); }, "The SIMD level in use.");
  m.def("set_simd_level", &set_simd_level, py::arg("name"));
  m.def("openmp_runtime", &cpu::openmp_runtime, "The OpenMP library in use, or 'none'.");
  m.def("why_cuda_unusable", &cuda::why_unusable, py::arg("device"),
        "Why CUDA device `device` can't be used; empty where it can.");
}
