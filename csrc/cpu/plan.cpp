#include "plan.h"

#include <algorithm>

namespace prox_sgd::cpu {

Plan::Plan(const std::vector<Operands>& operands, int threads) {
  starts_.reserve(operands.size());
  sizes_.reserve(operands.size());
  for (const Operands& o : operands) {
    starts_.push_back(total_);
    sizes_.push_back(o.numel);
    total_ += (o.numel + kLine - 1) / kLine * kLine;
  }
  // Large chunks read long runs of memory; four for each thread let others take a slow thread's.
  const int64_t even = total_ / (4 * std::max(threads, 1)) / kLine * kLine;
  chunk_ = std::clamp(even, kMinChunk, kMaxChunk);
}

int64_t Plan::tensor_at(int64_t position) const {
  // The last tensor that starts at or before the position: not an empty one, as the next tensor
  // starts at the same position.
  return std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
}

}  // namespace prox_sgd::cpu
