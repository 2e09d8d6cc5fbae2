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
// order in which squares are summed. Some may have a start, others not.
struct RowSet {
  std::vector<RowMember> members;
  Storage storage;
  int64_t rows;
  double lasso;           // group_lasso k: the threshold of a row is t = (lr lasso) a_g
  double weight;          // a_g of every row, unless there are
  const double* weights;  // a_g of each row, in the memory of the set's device; may be null
};

namespace cpu {

// Updates all sets in one pass over memory, in at most `threads` threads. Expects a SIMD level
// other than `none`, and thresholds that are finite and not negative.
void prox_sgd_rows(const std::vector<RowSet>& sets, const std::vector<Options>& options,
                   int threads);

}  // namespace cpu

namespace cuda {

// The options of a group, and its values in device memory.
struct RowOptions {
  Options options;
  DeviceValues values;
};

// How many parameters with how many different options a set may have that a CUDA kernel takes.
struct RowLimits {
  int64_t members;
  int64_t options;
};
RowLimits row_limits();

// The launches that update all sets, which have one storage and device: one for the sets whose
// members have no start and one for the others, unless the table of the kernel's parameter is too
// small for all. `capacity` bounds the sets of one launch; 0: as many as there is room for. Throws
// std::length_error for a set beyond the limits, or of more rows than a grid can cover.
std::vector<Launch> plan_rows(const std::vector<RowSet>& sets,
                              const std::vector<RowOptions>& options, Storage storage,
                              int64_t capacity = 0);

}  // namespace cuda
}  // namespace prox_sgd
