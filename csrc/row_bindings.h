// The part of the bindings that is about coupled rows.
#pragma once

#include <pybind11/pybind11.h>

namespace prox_sgd {

// Adds RowPlan and prox_sgd_rows_ to the module; expects Reading and Options there.
void bind_rows(pybind11::module_& m);

}  // namespace prox_sgd
