// The entry to the CPU kernels of coupled rows, beside the update of their elements.
#pragma once

#include "../prox_sgd.h"

namespace prox_sgd::cpu {

// `weights` are rows of `width` elements of the compute type, after the soft threshold.
struct RowKernels {
  size_t param_size;     // bytes of an element: the parameter's,
  size_t grad_size;      // its gradient's,
  size_t momentum_size;  // its momentum buffer's,
  size_t weight_size;    // and of `weights`

  // Adds the sum of squares of row i to sums[i], in the order of the contract
  // (docs/architecture.md).
  void (*add_squares)(const void* weights, int64_t rows, int64_t width, double* sums);

  // Turns each row's sum of squares into its factor.
  void (*to_factors)(double* sums, const double* thresholds, int64_t rows);

  // Multiplies row i by factors[i], rounded to the compute type, sets it to +0 where that is 0, and
  // multiplies by `ridge`. Stores the parameter, which may be `weights` itself. Returns its zeros
  // if `counts`, and something arbitrary otherwise.
  int64_t (*scale)(void* param, void* weights, int64_t rows, int64_t width, const double* factors,
                   double ridge, bool counts);

  // From 16-bit storage to float32 and back; null for storages that keep what the step computes
  // with, as float32, float64 and masters do.
  void (*widen)(const void* from, float* to, int64_t size);
  void (*narrow)(const float* from, void* to, int64_t size);
};

RowKernels row_kernels_for(Storage storage);

}  // namespace prox_sgd::cpu
