#include "row_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "rows.h"
#include "tensor_lists.h"

namespace py = pybind11;

namespace prox_sgd {
namespace {

// A set as Python describes it: for each member its reading and its place there, the number of
// rows, and the address of that many thresholds (float64).
using Described = std::tuple<std::vector<std::pair<size_t, int64_t>>, int64_t, std::uintptr_t>;

// The sets of a step with their groups' options. Keeps the readings, and so the tensors, alive.
struct RowPlan {
  std::vector<py::object> readings;
  std::vector<Options> options;
  std::vector<RowSet> sets;
};

// Where each parameter of a reading is: its batch and its place in it, null for one that isn't
// there.
struct Found {
  const Batch* batch = nullptr;
  size_t at = 0;
};

std::vector<Found> places(const Reading& reading) {
  std::vector<Found> found(reading.tensors.front().size());
  for (const Batch& batch : reading.batches) {
    for (size_t at = 0; at < batch.indices.size(); ++at) {
      found[static_cast<size_t>(batch.indices[at])] = {&batch, at};
    }
  }
  return found;
}

RowSet checked(const Described& described, const std::vector<std::vector<Found>>& found) {
  const auto& [members, rows, thresholds] = described;
  RowSet set{{}, Storage::float32, rows, reinterpret_cast<const double*>(thresholds)};
  if (rows < 1 || members.empty()) throw std::invalid_argument("a set needs rows and members");
  for (const auto& [part, index] : members) {
    const Found& place = found.at(part).at(static_cast<size_t>(index));
    if (place.batch == nullptr) throw std::invalid_argument("a member is empty or was not read");
    if (place.batch->device.device_type != dlpack::kCPU) {
      throw std::invalid_argument("coupled rows must be on a CPU");
    }
    if (set.members.empty()) set.storage = place.batch->storage;
    const Operands& operands = place.batch->operands[place.at];
    if (operands.start != nullptr) throw std::invalid_argument("coupled rows take no start");
    if (place.batch->storage != set.storage || operands.numel % rows != 0) {
      throw std::invalid_argument("the members of a set must have one storage and as many rows");
    }
    set.members.push_back({operands, operands.numel / rows, part});
  }
  return set;
}

RowPlan make_plan(std::vector<py::object> readings, std::vector<Options> options,
                  const std::vector<Described>& sets) {
  if (readings.size() != options.size()) {
    throw std::invalid_argument("each reading needs options");
  }
  std::vector<std::vector<Found>> found;
  for (const py::object& reading : readings) {
    const auto& read = reading.cast<const Reading&>();
    if (!read.rejections.empty()) throw std::invalid_argument("a reading has misfits");
    found.push_back(places(read));
  }
  RowPlan plan{std::move(readings), std::move(options), {}};
  for (const Described& set : sets) plan.sets.push_back(checked(set, found));
  return plan;
}

// `threads` is py::int_, which takes no object with __index__: no Python code may run between
// reading addresses and using them.
void run(const RowPlan& plan, const py::int_& threads) {
  const auto max_threads = threads.cast<int>();
  const py::gil_scoped_release release;
  cpu::prox_sgd_rows(plan.sets, plan.options, max_threads);
}

}  // namespace

void bind_rows(py::module_& m) {
  py::class_<RowPlan>(m, "RowPlan", "Sets of coupled rows, checked, with their options.")
      .def(py::init(&make_plan), py::arg("readings"), py::arg("options"), py::arg("sets"),
           "`sets`: for each its members, pairs of a reading's index and a parameter's in it; its "
           "number of rows; and the address of their thresholds, float64 on the CPU, which the "
           "caller keeps alive.");
  m.def("prox_sgd_rows_", &run, py::arg("plan"), py::arg("threads"),
        "One step on all sets of a plan, in place.");
}

}  // namespace prox_sgd
