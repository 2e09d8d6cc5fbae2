// Reads one Python tensor: its address, device, dtype, shape and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"
#include "storage.h"

namespace prox_sgd {

// A tensor's description in DLPack's terms. Borrows shape and strides from the tensor if torch's C
// exchange API described it, and owns them otherwise.
struct TensorView {
  dlpack::Tensor tensor;
  std::vector<int64_t> owned_dims;

  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  int64_t numel() const;
  bool dtype(DType* out) const;  // false for a dtype that no kernel knows
  bool is_dense() const;         // the elements fill one block of memory without gaps, in any order
  bool same_device(const TensorView& other) const;
  bool same_shape(const TensorView& other) const;
  bool same_layout(const TensorView& other) const;  // expects the same shape
};

// Describes tensors through DLPack's C exchange API where torch has it, and
// through a Python function that gives the same description where it doesn't.
class TensorDescriber {
 public:
  // `exchange_api`: the capsule of torch.Tensor.__dlpack_c_exchange_api__, or None. The other two
  // are used without one only: `describe`: tensor -> (address, device type, device index, dtype
  // code, bits, shape, strides), types and codes being DLPack's; `current_stream`: CUDA device
  // index -> address of torch's current stream. Throws std::invalid_argument for a capsule of
  // something else.
  TensorDescriber(pybind11::object exchange_api, pybind11::object describe,
                  pybind11::object current_stream);

  bool has_exchange_api() const { return api_ != nullptr; }

  // Returns false for a tensor that can't be described. An exception that isn't about the tensor
  // (KeyboardInterrupt) passes through.
  bool view(pybind11::handle tensor, TensorView* out) const;

  // The stream that torch works on now. Throws std::runtime_error if torch does not tell.
  void* current_stream(const dlpack::Device& device) const;

 private:
  bool view_described(pybind11::handle tensor, TensorView* out) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  pybind11::object capsule_;
  pybind11::object describe_;
  pybind11::object current_stream_;
};

}  // namespace prox_sgd
