// The entry to the CPU kernels of coupled rows. A row of a parameter is `width` elements; the
// arrays begin with the first of `rows` rows.
#pragma once

#include "../math/update.h"
#include "../prox_sgd.h"

namespace prox_sgd::cpu {

struct RowKernels {
  // Updates each element up to the soft threshold; stores momentum, and in `weights`, of the
  // compute type, what is to be scaled. Adds the sum of squares of row i, or of its distance from
  // its start, to sums[i], in the order of the contract (docs/architecture.md).
  void (*update)(const Operands& at, const void* coefficients, void* weights, int64_t rows,
                 int64_t width, double* sums);

  // Multiplies row i of `weights` by factors[i], rounded to the compute type, sets it to +0 where
  // that is 0, and multiplies by `ridge`; or does so with its distance from the start. Stores the
  // parameter, which may be `weights` itself. Returns its zeros, or what is at its start, if
  // `counts`, and something arbitrary otherwise.
  int64_t (*scale)(const Operands& at, void* weights, int64_t rows, int64_t width,
                   const double* factors, double ridge, bool counts);

  // Bytes of an element: of parameter and gradient, momentum buffer, `weights`, and start.
  int64_t param_size;
  int64_t momentum_size;
  int64_t weight_size;
  int64_t start_size;
  // Whether `weights` is memory of the caller's: 16-bit storage without a master, which is rounded
  // once, after its row was scaled.
  bool needs_scratch;
};

// `towards_start`: for operands with a start.
RowKernels row_kernels_for(Storage storage, MomentumMode mode, UpdateForm form, bool towards_start);

}  // namespace prox_sgd::cpu
