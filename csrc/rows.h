// Coupled rows: the groups of the group lasso. Nothing here knows Python or torch.
#pragma once

#include <cstdint>
#include <vector>

#include "prox_sgd.h"

namespace prox_sgd {

// One parameter of a set: row i is its elements [i * width, (i + 1) * width).
struct RowMember {
  Operands operands;
  int64_t width;
  size_t options;  // index of its group's options
};

// Parameters whose rows are coupled: row i of all of them together is one group. Members are in the
// order in which squares are summed.
struct RowSet {
  std::vector<RowMember> members;
  Storage storage;
  int64_t rows;
  const double* thresholds;  // t of each row: lr (group_lasso k) a_g
};

namespace cpu {

// Updates all sets in one pass over memory, in at most `threads` threads. Expects a SIMD level
// other than `none`, and thresholds that are finite and not negative.
void prox_sgd_rows(const std::vector<RowSet>& sets, const std::vector<Options>& options,
                   int threads);

}  // namespace cpu
}  // namespace prox_sgd
