#include "row_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rows.h"
#include "steps.h"
#include "tensor_lists.h"

namespace py = pybind11;

namespace prox_sgd {
namespace {

// A set as Python describes it: for each member its step and its place in the step's reading; the
// number of rows; group_lasso k; a_g of every row, and the address of that many numbers (float64,
// on the set's device) that count instead, or 0.
using Described =
    std::tuple<std::vector<std::pair<size_t, int64_t>>, int64_t, double, double, Address>;

// Sets of one storage on one CUDA device.
struct CudaRows {
  dlpack::Device device;
  Storage storage;
  std::vector<RowSet> sets;
  std::vector<cuda::Launch> launches;
};

// The sets of a step. Keeps the readings, and so the tensors, alive.
struct RowPlan {
  py::list steps;
  std::vector<Options> options;
  std::vector<RowSet> on_cpu;
  std::vector<CudaRows> on_cuda;
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

// The set, and on which device it is.
std::pair<RowSet, dlpack::Device> checked(const Described& described,
                                          const std::vector<std::vector<Found>>& found) {
  const auto& [members, rows, lasso, weight, weights] = described;
  RowSet set{{}, Storage::float32, rows, lasso, weight, reinterpret_cast<const double*>(weights)};
  dlpack::Device device{};
  if (rows < 1 || members.empty()) throw std::invalid_argument("a set needs rows and members");
  for (const auto& [step, index] : members) {
    const Found& place = found.at(step).at(static_cast<size_t>(index));
    if (place.batch == nullptr) throw std::invalid_argument("a member is empty or was not read");
    const Batch& batch = *place.batch;
    if (set.members.empty()) {
      set.storage = batch.storage;
      device = batch.device;
    }
    const Operands& operands = batch.operands[place.at];
    if (batch.storage != set.storage || batch.device.device_type != device.device_type ||
        batch.device.device_id != device.device_id || operands.numel % rows != 0) {
      throw std::invalid_argument(
          "the members of a set must have one storage, one device and as many rows");
    }
    set.members.push_back({operands, operands.numel / rows, step});
  }
  return {std::move(set), device};
}

// Plans the launches of each device and storage.
std::vector<CudaRows> planned(std::map<std::pair<int32_t, Storage>, CudaRows>& by_kind,
                              const std::vector<Step>& steps) {
  std::vector<CudaRows> made;
  for (auto& [key, kind] : by_kind) {
    std::vector<cuda::RowOptions> options;
    for (const Step& step : steps) {
      options.push_back({step.options, values_on(step.device_values, kind.device.device_id)});
    }
    kind.launches = cuda::plan_rows(kind.sets, options, kind.storage);
    made.push_back(std::move(kind));
  }
  return made;
}

RowPlan make_plan(const py::list& given, const std::vector<Described>& sets) {
  RowPlan plan{py::list(), {}, {}, {}};
  const std::vector<Step> steps = steps_from(given);
  std::vector<std::vector<Found>> found;
  for (const Step& step : steps) {
    if (!step.reading.rejections.empty()) throw std::invalid_argument("a reading has misfits");
    found.push_back(places(step.reading));
    plan.options.push_back(step.options);
  }
  for (const py::handle step : given) plan.steps.append(step);
  std::map<std::pair<int32_t, Storage>, CudaRows> by_kind;
  for (const Described& described : sets) {
    auto [set, device] = checked(described, found);
    if (device.device_type == dlpack::kCPU) {
      plan.on_cpu.push_back(std::move(set));
      continue;
    }
    CudaRows& kind = by_kind[{device.device_id, set.storage}];
    kind.device = device;
    kind.storage = set.storage;
    kind.sets.push_back(std::move(set));
  }
  plan.on_cuda = planned(by_kind, steps);
  return plan;
}

// `threads` is py::int_, which takes no object with __index__: no Python code may run between
// reading addresses and using them.
void run(const TensorReader& reader, const RowPlan& plan, const py::int_& threads) {
  const auto max_threads = threads.cast<int>();
  std::vector<void*> streams;
  for (const CudaRows& rows : plan.on_cuda) {
    streams.push_back(reader.describer().current_stream(rows.device));
  }
  const py::gil_scoped_release release;
  for (size_t i = 0; i < streams.size(); ++i) {
    const CudaRows& rows = plan.on_cuda[i];
    cuda::launch(rows.launches, rows.storage, rows.device.device_id, streams[i]);
  }
  cpu::prox_sgd_rows(plan.on_cpu, plan.options, max_threads);
}

// A set without tensors: for each member its addresses and elements, and the index of its options;
// the rest as in Described.
using Addressed =
    std::tuple<std::vector<std::pair<AddressRow, size_t>>, int64_t, double, double, Address>;

py::list plan_cuda(const std::string& storage,
                   const std::vector<std::pair<Options, cuda::DeviceValues>>& given,
                   const std::vector<Addressed>& described_sets, int64_t capacity) {
  std::vector<cuda::RowOptions> options;
  for (const auto& [of_group, values] : given) options.push_back({of_group, values});
  std::vector<RowSet> sets;
  for (const auto& [members, rows, lasso, weight, weights] : described_sets) {
    RowSet set{
        {}, storage_named(storage), rows, lasso, weight, reinterpret_cast<const double*>(weights)};
    for (const auto& [row, index] : members) {
      const Operands operands = operands_from({row}).front();
      if (rows < 1 || operands.numel < rows || index >= options.size()) {
        throw std::invalid_argument("a member needs elements for each row, and options");
      }
      set.members.push_back({operands, operands.numel / rows, index});
    }
    sets.push_back(std::move(set));
  }
  return described(cuda::plan_rows(sets, options, storage_named(storage), capacity));
}

}  // namespace

void bind_rows(py::module_& m) {
  py::class_<RowPlan>(m, "RowPlan", "Sets of coupled rows, checked, with their options.")
      .def(py::init(&make_plan), py::arg("steps"), py::arg("sets"),
           "`steps`: as for prox_sgd_. `sets`: for each its members, pairs of a step's index and a "
           "parameter's in its reading; its number of rows; group_lasso k; a_g of every row, and "
           "the address of one for each row instead, float64 on the set's device, which the caller "
           "keeps alive, or 0.");
  m.def("prox_sgd_rows_", &run, py::arg("reader"), py::arg("plan"), py::arg("threads"),
        "One step on all sets of a plan, in place.");
  m.def("plan_prox_sgd_rows_cuda", &plan_cuda, py::arg("storage"), py::arg("options"),
        py::arg("sets"), py::arg("capacity") = 0,
        "The launches for sets of coupled rows, as plan_prox_sgd_cuda's. `options`: pairs of "
        "Options and DeviceValues. `sets`: as RowPlan's, a member being a row of addresses and the "
        "index of its options.");
  const cuda::RowLimits limits = cuda::row_limits();
  m.attr("cuda_row_limits") = py::make_tuple(limits.members, limits.options);
}

}  // namespace prox_sgd
