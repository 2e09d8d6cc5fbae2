// An operand's arrays in the types of their storage.
#pragma once

#include "prox_sgd.h"

namespace prox_sgd {

// `weight` is the array that the step updates: the master, or the parameter itself.
template <typename T>
struct TypedArrays {
  typename T::Param* param;
  const typename T::Grad* grad;
  typename T::MomentumBuffer* momentum_buffer;  // not to be used without momentum
  typename T::Weight* weight;
  const typename T::Weight* start;  // null where the step is towards zero
};

// The arrays from element `begin` on, which is 0 where an array is null; T is a TypesOf<...>.
template <typename T>
PROX_SGD_HD TypedArrays<T> arrays_from(const Operands& o, int64_t begin) {
  void* const weight = T::has_master ? o.master_param : o.param;
  return {static_cast<typename T::Param*>(o.param) + begin,
          static_cast<const typename T::Grad*>(o.grad) + begin,
          static_cast<typename T::MomentumBuffer*>(o.momentum_buffer) + begin,
          static_cast<typename T::Weight*>(weight) + begin,
          o.start == nullptr ? nullptr : static_cast<const typename T::Weight*>(o.start) + begin};
}

}  // namespace prox_sgd
