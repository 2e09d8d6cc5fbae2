// What Python gives for a step, and for a plan without tensors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "prox_sgd.h"
#include "tensor_lists.h"

namespace prox_sgd {

namespace py = pybind11;

using Address = std::uintptr_t;

inline Storage storage_named(const std::string& name) {
  int number = 0;
  for (const char* known : kStorageNames) {
    if (name == known) return static_cast<Storage>(number);
    ++number;
  }
  throw std::invalid_argument("storage '" + name + "' is unknown");
}

// CUDA device index -> the values in that device's memory.
inline cuda::DeviceValues values_on(const py::dict& device_values, int device) {
  for (const auto& [index, values] : device_values) {
    if (!py::isinstance<py::int_>(index)) throw py::type_error("device_values: a key is no int");
    if (index.cast<int>() == device) return values.cast<cuda::DeviceValues>();
  }
  return {};
}

// A bucket to step: tensors, options and the values in devices' memory.
struct Step {
  const Reading& reading;
  const Options& options;
  py::dict device_values;
};

// Throws TypeError for anything else; no Python code runs.
inline std::vector<Step> steps_from(const py::list& given) {
  std::vector<Step> steps;
  for (const py::handle row : given) {
    const auto step =
        py::isinstance<py::tuple>(row) ? py::reinterpret_borrow<py::tuple>(row) : py::tuple();
    if (step.size() != 3 || !py::isinstance<Reading>(step[0]) ||
        !py::isinstance<Options>(step[1]) || !py::isinstance<py::dict>(step[2])) {
      throw py::type_error("steps: must be tuples of a Reading, Options and a dict");
    }
    steps.push_back({step[0].cast<const Reading&>(), step[1].cast<const Options&>(),
                     py::reinterpret_borrow<py::dict>(step[2])});
  }
  return steps;
}

// Addresses of parameter, gradient, momentum buffer, master, start and zero counter (0 for none),
// and the number of elements.
using AddressRow = std::tuple<Address, Address, Address, Address, Address, Address, int64_t>;

inline std::vector<Operands> operands_from(const std::vector<AddressRow>& rows) {
  std::vector<Operands> operands;
  operands.reserve(rows.size());
  for (const auto& [param, grad, momentum_buffer, master_param, start, num_zeros, numel] : rows) {
    if (numel < 0) throw std::invalid_argument("numel must not be negative");
    operands.push_back({reinterpret_cast<void*>(param), reinterpret_cast<const void*>(grad),
                        reinterpret_cast<void*>(momentum_buffer),
                        reinterpret_cast<void*>(master_param), reinterpret_cast<const void*>(start),
                        numel, reinterpret_cast<int64_t*>(num_zeros)});
  }
  return operands;
}

// Launches as Python sees them: kernel, grid, block and parameter bytes of each.
inline py::list described(const std::vector<cuda::Launch>& launches) {
  py::list entries;
  for (const cuda::Launch& launch : launches) {
    py::dict entry;
    entry["kernel"] = launch.kernel;
    entry["grid"] = launch.grid;
    entry["block"] = launch.block;
    entry["parameters"] = py::bytes(reinterpret_cast<const char*>(launch.parameters.data()),
                                    launch.parameters.size());
    entries.append(std::move(entry));
  }
  return entries;
}

}  // namespace prox_sgd
