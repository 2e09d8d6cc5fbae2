// Reads lists of Python tensors and checks them: batches of operands for the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "prox_sgd.h"
#include "tensor_view.h"

namespace prox_sgd {

// Parameters of one device and one storage: one call of a kernel.
struct Batch {
  dlpack::Device device;
  Storage storage;
  std::vector<Operands> operands;
  std::vector<int64_t> indices;  // the operands' places in the lists
};

// Why the native kernels can't take a parameter as it is. Ordered: the first reason that holds is
// given, so a parameter with `layout` fits once its tensors are laid out alike.
enum class Reason : int32_t {
  fits,
  subclass,    // neither exactly torch.Tensor nor exactly torch.nn.Parameter
  unreadable,  // DLPack can't describe it, or it has no memory of its own
  device,      // neither CPU nor CUDA
  dtype,       // not a floating-point type that a kernel knows
  mixed,       // its tensors differ in shape or device, or in dtype in a way that no storage has
  not_dense,   // the parameter has gaps, overlaps or repeats in memory
  shared,      // the parameter shares memory with another: threads would write to it at once
  no_cuda,     // on a CUDA device that this build can't use
  no_cpu,      // on a CPU that this build can't use
  layout,      // its gradient or state has another memory layout, dense or not
};

struct Rejection {
  int64_t index;
  Reason reason;
  std::string in_words;  // for an error message: "..., but it is not dense"
};

// Tensors that were read and checked. Holds the lists: the batches hold addresses.
struct Reading {
  std::vector<Batch> batches;
  std::vector<Rejection> rejections;  // in order of index
  std::vector<pybind11::list> tensors;
};

// Turns lists of tensors into batches.
class TensorReader {
 public:
  // `tensor_type`, `parameter_type`: the types whose memory is what their description says. A
  // subclass may hold anything behind it.
  TensorReader(TensorDescriber describer, pybind11::object tensor_type,
               pybind11::object parameter_type);

  const TensorDescriber& describer() const { return describer_; }

  // Reads params[i] with grads[i] and, unless they are None, momentum_buffers[i],
  // master_params[i] and starts[i]. `num_zeros`: an array of counters, one a parameter, or null. A
  // parameter that the kernels can't take is in `rejections`; an empty one is in no batch. Throws
  // std::invalid_argument unless the lists have one length; nothing is raised for a tensor.
  Reading read(const pybind11::list& params, const pybind11::list& grads,
               const std::optional<pybind11::list>& momentum_buffers,
               const std::optional<pybind11::list>& master_params,
               const std::optional<pybind11::list>& starts, int64_t* num_zeros) const;

 private:
  bool is_plain(pybind11::handle tensor) const;

  TensorDescriber describer_;
  pybind11::object tensor_type_;
  pybind11::object parameter_type_;
};

}  // namespace prox_sgd
