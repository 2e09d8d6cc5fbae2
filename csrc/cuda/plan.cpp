// Lays parameters out in the tables of as many launches as they need.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "../prox_sgd.h"
#include "params.h"

namespace prox_sgd::cuda {
namespace {

constexpr int64_t round_up(int64_t units) {
  return (units + kUnitsPerBlock - 1) / kUnitsPerBlock * kUnitsPerBlock;
}

bool has_start(const Bucket& bucket) {
  return !bucket.operands.empty() && bucket.operands.front().start != nullptr;
}

// The table that is being filled.
template <typename T>
class Plan {
 public:
  using C = typename T::Compute;

  Plan(Storage storage, bool towards_start, int64_t capacity)
      : storage_(storage),
        towards_start_(towards_start),
        capacity_(cuda::capacity<C>(towards_start ? kSmallTable : kLargeTable)) {
    if (capacity > 0) capacity_ = std::min(capacity_, capacity);
    reset();
  }

  void add(const Bucket& bucket) {
    bool listed = false;  // in this table
    for (const Operands& o : bucket.operands) {
      if (o.numel == 0) continue;
      if (header_.count == capacity_ || (!listed && groups_ == kMostGroups)) {
        flush();
        listed = false;
      }
      if (!listed) header_.groups[groups_++] = group_of<C>(bucket.options, bucket.values);
      listed = true;
      add(o);
    }
  }

  std::vector<Launch> finish() {
    flush();
    return std::move(launches_);
  }

 private:
  void add(const Operands& o) {
    if (pieces_ == kMostPieces) {
      units_ = round_up(units_);
      pieces_ = 0;
    }
    Entry& entry = entries_.emplace_back();
    entry.operands = o;
    // Without momentum the kernel never uses the buffer's address, but adds to it: undefined for
    // null.
    if (o.momentum_buffer == nullptr) entry.operands.momentum_buffer = o.param;
    entry.first_unit = units_;
    entry.group = groups_ - 1;
    ++header_.count;
    const int64_t block = units_ / kUnitsPerBlock;
    units_ += (o.numel + T::per_unit - 1) / T::per_unit;
    if (units_ / kUnitsPerBlock == block) {
      ++pieces_;
    } else {
      pieces_ = units_ % kUnitsPerBlock == 0 ? 0 : 1;
    }
  }

  void flush() {
    if (header_.count == 0) return;
    const int64_t blocks = round_up(units_) / kUnitsPerBlock;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::length_error("ProxSGD: a bucket of tensors too large for one CUDA grid");
    }
    const bool small = header_.count <= cuda::capacity<C>(kSmallTable);
    std::vector<unsigned char> table(small ? sizeof(Table<C, kSmallTable>)
                                           : sizeof(Table<C, kLargeTable>));
    std::memcpy(table.data(), &header_, sizeof header_);
    std::memcpy(table.data() + sizeof header_, entries_.data(), entries_.size() * sizeof(Entry));
    const int kib = (small ? kSmallTable : kLargeTable) / 1000;
    launches_.push_back({std::string("prox_sgd_") + name_of(storage_) +
                             (towards_start_ ? "_start_" : "_") + std::to_string(kib) + "k",
                         towards_start_, static_cast<uint32_t>(blocks), kThreads,
                         std::move(table)});
    reset();
  }

  void reset() {
    std::memset(static_cast<void*>(&header_), 0, sizeof header_);  // padding is copied, too
    entries_.clear();
    groups_ = 0;
    units_ = 0;
    pieces_ = 0;
  }

  Storage storage_;
  bool towards_start_;
  int64_t capacity_;
  Header<C> header_;
  std::vector<Entry> entries_;
  int groups_ = 0;
  int64_t units_ = 0;  // of all entries together, gaps included
  int pieces_ = 0;     // entries in the block that the next unit belongs to
  std::vector<Launch> launches_;
};

}  // namespace

std::vector<Launch> plan(const std::vector<Bucket>& buckets, Storage storage, int64_t capacity) {
  return with_storage(storage, [&](auto tag) {
    std::vector<Launch> launches;
    for (const bool towards_start : {false, true}) {
      Plan<TypesOf<decltype(tag)::storage>> plan(storage, towards_start, capacity);
      for (const Bucket& bucket : buckets) {
        if (has_start(bucket) == towards_start) plan.add(bucket);
      }
      std::vector<Launch> made = plan.finish();
      std::move(made.begin(), made.end(), std::back_inserter(launches));
    }
    return launches;
  });
}

}  // namespace prox_sgd::cuda
