// Cuts the elements of a call into chunks for the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../prox_sgd.h"

namespace prox_sgd::cpu {

// Lays the tensors end to end and cuts the line into chunks of equal size. A chunk may be a part of
// one large tensor or hold many small ones: the work is balanced whatever the sizes are.
class Plan {
 public:
  // A tensor takes a whole multiple of these elements. Where it starts on a cache line, no two
  // chunks then write to one line.
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kMinChunk = 128 * kLine;
  static constexpr int64_t kMaxChunk = 2048 * kLine;

  Plan(const std::vector<Operands>& operands, int threads);

  int64_t chunks() const { return (total_ + chunk_ - 1) / chunk_; }

  // Elements [begin, end) of one tensor.
  struct Range {
    int64_t tensor;
    int64_t begin;
    int64_t end;
  };

  // Calls visit(Range) for every range of a chunk, in order.
  template <typename Visit>
  void visit(int64_t chunk, Visit&& visit) const {
    int64_t at = chunk * chunk_;
    const int64_t stop = at + chunk_ < total_ ? at + chunk_ : total_;
    for (int64_t tensor = tensor_at(at); at < stop; ++tensor) {
      const int64_t next = tensor + 1 < count() ? starts_[tensor + 1] : total_;
      const int64_t begin = at - starts_[tensor];
      const int64_t end = (next < stop ? next : stop) - starts_[tensor];
      const int64_t numel = sizes_[tensor];
      if (begin < numel) visit(Range{tensor, begin, end < numel ? end : numel});
      at = next < stop ? next : stop;
    }
  }

 private:
  int64_t count() const { return static_cast<int64_t>(starts_.size()); }
  int64_t tensor_at(int64_t position) const;

  std::vector<int64_t> starts_;  // where a tensor starts, counted in elements rounded up to lines
  std::vector<int64_t> sizes_;
  int64_t total_ = 0;
  int64_t chunk_ = kMinChunk;
};

}  // namespace prox_sgd::cpu
