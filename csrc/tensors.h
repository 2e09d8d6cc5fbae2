// Reads lists of Python tensors into buckets of checked operands.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "dlpack_abi.h"
#include "prox_sgd.h"

namespace prox_sgd {

// A reference to a Python object that is given up with it.
class OwnedObject {
 public:
  OwnedObject() = default;
  explicit OwnedObject(PyObject* stolen) : object_(stolen) {}
  OwnedObject(OwnedObject&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  OwnedObject& operator=(OwnedObject&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~OwnedObject() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

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
  negated,     // its gradient is a lazily negated view, of which DLPack says nothing
};

const char* describe(Unfit reason);

struct Misfit {
  int64_t index;
  Unfit reason;
};

// Tensors that were read and checked, and the lists that own them: what is read are addresses.
struct Reading {
  std::vector<Bucket> buckets;
  std::vector<Misfit> misfits;  // in order of index
  std::array<OwnedObject, 4> owners;
};

// A Python exception that isn't for this code to handle, as Ctrl-C's: it is still set.
struct Interrupted {};

// Parameters with what a step of them takes: Python lists of one length, and their reading. Where
// the state has no such tensors, the list is null.
struct Gathered {
  OwnedObject params;
  OwnedObject grads;
  OwnedObject momenta;
  OwnedObject masters;
  Reading reading;
};

// Turns Python tensors into buckets, through DLPack's C exchange API where torch has it and through
// a Python function that gives the same description where it doesn't.
class TensorReader {
 public:
  // `exchange_api`: the capsule of torch.Tensor.__dlpack_c_exchange_api__, or None.
  // `describe`: tensor -> (address, device type, device index, code, bits, shape, strides), codes
  // and types being DLPack's; `stream`: CUDA device index -> address of torch's current stream.
  // Both are used without an exchange API only. `is_neg`: tensor -> whether it is a lazily negated
  // view. `tensor_type`, `parameter_type`: the two types whose memory is what it seems. Throws
  // std::invalid_argument for a capsule that is none.
  TensorReader(PyObject* exchange_api, PyObject* describe, PyObject* stream, PyObject* is_neg,
               PyObject* tensor_type, PyObject* parameter_type);

  bool has_exchange_api() const { return api_ != nullptr; }

  // Reads params[i], grads[i], momenta[i] and masters[i]: Python lists, the last two may be
  // Py_None. Throws std::invalid_argument unless they are of one length. `zeros`: an array of
  // counters, one a parameter, or null. What does not fit is in `misfits` and in no bucket, nor is
  // what has no elements; nothing is raised for a tensor, whatever it is. Throws Interrupted, as
  // gather() does.
  Reading read(PyObject* params, PyObject* grads, PyObject* momenta, PyObject* masters,
               int64_t* zeros) const;

  // The quick way to the tensors of a step: takes the gradients of those parameters that have one
  // and looks up momentum buffers and master weights, as asked for, in `state`, an optimizer's.
  // `zeros`: an array of counters as long as `params`, on the device of the first; or null.
  // `position`: PyDict_Next's in the state, 0 to begin with, moved past what was taken: it mostly
  // is in the order of the parameters, and a look-up by a tensor's hash is a call of Python code.
  // Nothing is returned, and the position not moved, where anything is out of the ordinary: a
  // parameter at its first step, say, or a tensor that does not fit.
  std::optional<Gathered> gather(PyObject* params, PyObject* state, bool with_momenta,
                                 bool with_masters, int64_t* zeros, Py_ssize_t* position) const;

  // The stream that torch works on now. Throws std::runtime_error if torch does not tell.
  void* current_stream(int32_t device_type, int32_t device_id) const;

 private:
  struct View;
  class Block;
  class Sorter;
  // Shapes and strides that were read without the exchange API; with it, they are torch's own.
  using Dims = std::deque<std::vector<int64_t>>;
  bool view(PyObject* tensor, View* out, Dims* kept) const;
  PyObject* grad_of(PyObject* param) const;
  PyObject* negated(PyObject* tensor) const;
  bool plain(PyObject* tensor) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  OwnedObject capsule_;
  OwnedObject describe_;
  OwnedObject stream_;
  OwnedObject is_neg_;
  OwnedObject tensor_type_;
  OwnedObject parameter_type_;
  OwnedObject grad_name_;
  // What `param.grad` and `is_neg(tensor)` come down to, where that is a function of C.
  getter get_grad_ = nullptr;
  void* get_grad_with_ = nullptr;
  PyCFunction call_is_neg_ = nullptr;
  OwnedObject momentum_name_;
  OwnedObject master_name_;
};

}  // namespace prox_sgd
