// The kernel's entry, once for each instruction set that kernel.cpp is compiled for.
#pragma once

#include "../prox_sgd.h"

namespace prox_sgd::cpu {

// Updates elements [begin, end) of one triple.
using Kernel = void (*)(const Triple& triple, const void* coefficients, int64_t begin, int64_t end);

namespace baseline {
Kernel kernel(DType dtype, Momentum mode);
}
namespace avx2 {
Kernel kernel(DType dtype, Momentum mode);
}

}  // namespace prox_sgd::cpu
