// Stands in for elements.cpp and rows.cpp where the compiler has no AVX2, on x86.
#include <stdexcept>

#include "elements.h"
#include "rows.h"

namespace prox_sgd::cpu {

Kernel kernel_for(Storage, MomentumMode, UpdateForm, bool, bool) {
  throw std::logic_error("ProxSGD: built without a CPU kernel");
}

RowKernels row_kernels_for(Storage, MomentumMode, UpdateForm, bool) {
  throw std::logic_error("ProxSGD: built without a CPU kernel");
}

}  // namespace prox_sgd::cpu
