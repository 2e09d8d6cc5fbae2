// Reads lists of Python tensors into buckets of checked operands.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack_abi.h"
#include "prox_sgd.h"

namespace prox_sgd {

// Parameters that one launch can take: of one device and kind.
struct Bucket {
  int32_t device_type;
  int32_t device_id;
  Kind kind;
  std::vector<Operands> operands;
};

// Why a parameter with its tensors can't be taken by a native kernel as it is.
enum class Unfit : int32_t {
  fit,
  type,        // not exactly torch.Tensor or torch.nn.Parameter
  unreadable,  // DLPack can't describe it, or it has no memory of its own
  device,      // neither CPU nor CUDA
  dtype,       // not a floating-point type of ours
  not_dense,   // the parameter has holes, overlaps or repeats
  mixed,       // its tensors differ in shape or device, or in dtype in a way that no kind has
  layout,      // its tensors are laid out differently, each dense or not
  no_cuda,     // on a CUDA device that this build can't use
};

const char* describe(Unfit reason);

struct Misfit {
  int64_t index;
  Unfit reason;
};

struct Reading {
  std::vector<Bucket> buckets;
  std::vector<Misfit> misfits;  // in order of index
};

// Turns Python tensors into buckets, through DLPack's C exchange API where torch has it and through
// a Python function that gives the same description where it doesn't.
class TensorReader {
 public:
  // `exchange_api`: the capsule of torch.Tensor.__dlpack_c_exchange_api__, or None.
  // `describe`: tensor -> (address, device type, device index, code, bits, shape, strides), codes
  // and types being DLPack's; `stream`: CUDA device index -> address of torch's current stream.
  // Both are used without an exchange API only. `tensor_type`, `parameter_type`: the two types
  // whose memory is what it seems. Throws std::invalid_argument for a capsule that is none.
  TensorReader(PyObject* exchange_api, PyObject* describe, PyObject* stream, PyObject* tensor_type,
               PyObject* parameter_type);
  ~TensorReader();
  TensorReader(const TensorReader&) = delete;
  TensorReader& operator=(const TensorReader&) = delete;

  bool has_exchange_api() const { return api_ != nullptr; }

  // Reads params[i], grads[i], momenta[i] and masters[i]; the last two are Py_None or lists, as is
  // `zeros`, which holds the addresses of counters, one a parameter. The lists must be Python lists
  // of one length. What does not fit is in `misfits` and in no bucket; nothing is raised for a
  // tensor, whatever it is.
  Reading read(PyObject* params, PyObject* grads, PyObject* momenta, PyObject* masters,
               PyObject* zeros) const;

  // The stream that torch works on now. Throws std::runtime_error if torch does not tell.
  void* current_stream(int32_t device_type, int32_t device_id) const;

 private:
  struct View;
  bool view(PyObject* tensor, View* out) const;
  Unfit check(PyObject* param, PyObject* grad, PyObject* momentum, PyObject* master, Bucket* key,
              Operands* out) const;
  bool plain(PyObject* tensor) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  PyObject* capsule_ = nullptr;
  PyObject* describe_;
  PyObject* stream_;
  PyObject* tensor_type_;
  PyObject* parameter_type_;
};

}  // namespace prox_sgd
