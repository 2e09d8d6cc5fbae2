// The kernel's entry, once for each instruction set that kernel.cpp is compiled for.
#pragma once

#include "../prox_sgd.h"

namespace prox_sgd::cpu {

// Updates elements [begin, end) of one parameter. Returns how many of them are zero then, if it is
// the kernel with extras; 0 else.
using Kernel = int64_t (*)(const Operands& operands, const void* coefficients, int64_t begin,
                           int64_t end);

namespace baseline {
Kernel kernel(Kind kind, Momentum mode, bool extras);
}
namespace avx2 {
Kernel kernel(Kind kind, Momentum mode, bool extras);
}

}  // namespace prox_sgd::cpu
