// The kernel's entry, once for each instruction set that kernel.cpp is compiled for.
#pragma once

#include "../prox_sgd.h"
#include "../prox_sgd_math.h"

namespace prox_sgd::cpu {

// Updates elements [begin, end) of one parameter, asking for memory `lines_ahead` cache lines
// before it is used. Returns how many of the elements are zero then if it was asked for with
// `counts`, and else what nobody should use.
using Kernel = int64_t (*)(const Operands& operands, const void* coefficients, int64_t begin,
                           int64_t end, int64_t lines_ahead);

namespace baseline {
Kernel kernel(Kind kind, Momentum mode, Steps steps, bool counts);
}
namespace avx2 {
Kernel kernel(Kind kind, Momentum mode, Steps steps, bool counts);
}

}  // namespace prox_sgd::cpu
