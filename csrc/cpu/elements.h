// The entry to the CPU kernel.
#pragma once

#include "../math/update.h"
#include "../prox_sgd.h"

namespace prox_sgd::cpu {

// Updates elements [begin, end) of one parameter. Returns how many of them are zero afterwards, or
// with a start equal to it, if the kernel was chosen with `counts`, and something arbitrary
// otherwise.
using Kernel = int64_t (*)(const Operands& operands, const void* coefficients, int64_t begin,
                           int64_t end);

// `towards_start`: for operands with a start.
Kernel kernel_for(Storage storage, MomentumMode mode, UpdateForm form, bool counts,
                  bool towards_start);

}  // namespace prox_sgd::cpu
