// Lays sets of coupled rows out in the tables of as many launches as they need.
#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "row_table.h"

namespace prox_sgd::cuda {
namespace {

constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a block can hold so many rows of a set. Each member begins with a whole unit.
template <typename T>
bool can_hold(const RowSet& set, int64_t rows) {
  int64_t elements = 0;
  int64_t sums = 0;
  for (const RowMember& member : set.members) {
    elements += quotient_up(rows * member.width, T::per_unit) * T::per_unit;
    if (member.width > 1) sums += rows * quotient_up(member.width, kSegment);
  }
  return elements <= kMostHeld<typename T::Compute> && sums <= kMostSums;
}

// The most rows that a block can hold, one for each thread; 0 where not even one fits. Pieces of
// whole units keep the addresses of the next piece aligned.
template <typename T>
int64_t rows_of_a_piece(const RowSet& set) {
  int64_t width = 0;
  for (const RowMember& member : set.members) width += member.width;
  int64_t rows = std::min<int64_t>(kMostHeld<typename T::Compute> / width, kThreads);
  rows = std::min(rows, set.rows);
  while (rows > 0 && !can_hold<T>(set, rows)) --rows;
  const bool whole = rows == set.rows || rows < T::per_unit;
  return whole ? rows : rows / T::per_unit * T::per_unit;
}

bool has_start(const RowSet& set) {
  return std::any_of(set.members.begin(), set.members.end(),
                     [](const RowMember& member) { return member.operands.start != nullptr; });
}

bool equal(const RowOptions& a, const RowOptions& b) {
  bool same = true;
  Options::for_each_field(
      [&](const char*, auto field) { same = same && a.options.*field == b.options.*field; });
  DeviceValues::for_each_field(
      [&](const char*, auto field) { same = same && a.values.*field == b.values.*field; });
  return same;
}

// The table that is being filled.
template <typename T>
class Plan {
 public:
  using C = typename T::Compute;

  Plan(Storage storage, bool towards_start, const std::vector<RowOptions>& options,
       int64_t capacity)
      : storage_(storage),
        towards_start_(towards_start),
        options_(options),
        capacity_(capacity > 0 ? capacity : std::numeric_limits<int64_t>::max()) {
    reset();
  }

  void add(const RowSet& set) {
    const int64_t piece_rows = rows_of_a_piece<T>(set);
    const int64_t pieces = quotient_up(set.rows, std::max<int64_t>(piece_rows, 1));
    if (!has_room(set, pieces)) flush();
    if (!has_room(set, pieces)) {
      throw std::length_error("ProxSGD: a set of coupled rows too large for one CUDA launch");
    }
    sets_.push_back({set.weights, set.weight, set.lasso, set.rows, static_cast<int32_t>(pieces_),
                     static_cast<int32_t>(piece_rows), static_cast<int32_t>(members_.size()),
                     static_cast<int32_t>(set.members.size()), 0});
    for (const RowMember& member : set.members) add(member);
    pieces_ += pieces;
  }

  std::vector<Launch> finish() {
    flush();
    return std::move(launches_);
  }

 private:
  void add(const RowMember& member) {
    const Operands& o = member.operands;
    MemberEntry& entry = members_.emplace_back();
    entry.param = o.param;
    entry.grad = o.grad;
    // The kernel adds to it also where it doesn't use it: undefined for null.
    entry.momentum_buffer = o.momentum_buffer == nullptr ? o.param : o.momentum_buffer;
    entry.master_param = o.master_param;
    entry.start = o.start;
    entry.num_zeros = o.num_zeros;
    entry.width = member.width;
    entry.group = static_cast<int64_t>(place(member.options, listed_));
    const RowOptions& options = options_[member.options];
    header_.groups[entry.group] = group_of<C>(options.options, options.values);
  }

  // Where options are in a list of them, which they join where no equal ones are there.
  size_t place(size_t index, std::vector<size_t>& listed) const {
    const auto is_equal = [&](size_t other) {
      return other == index || equal(options_[other], options_[index]);
    };
    const auto found = std::find_if(listed.begin(), listed.end(), is_equal);
    const auto at = static_cast<size_t>(found - listed.begin());
    if (found == listed.end()) listed.push_back(index);
    return at;
  }

  bool has_room(const RowSet& set, int64_t pieces) const {
    std::vector<size_t> listed = listed_;
    for (const RowMember& member : set.members) {
      place(member.options, listed);
      if (listed.size() > kMostGroups) return false;
    }
    return static_cast<int64_t>(sets_.size()) < capacity_ &&
           sets_.size() + 1 + members_.size() + set.members.size() <= kRowSlots<C> &&
           pieces <= std::numeric_limits<int32_t>::max() - pieces_;
  }

  void flush() {
    if (sets_.empty()) return;
    header_.count = static_cast<int32_t>(sets_.size());
    for (SetEntry& set : sets_) set.first_member += header_.count;
    std::vector<unsigned char> table(sizeof(RowTable<C>));
    unsigned char* to = table.data();
    const auto write = [&to](const void* from, size_t bytes) {
      std::memcpy(to, from, bytes);
      to += bytes;
    };
    write(&header_, sizeof header_);
    write(sets_.data(), sets_.size() * sizeof(SetEntry));
    write(members_.data(), members_.size() * sizeof(MemberEntry));
    const std::string kernel = std::string("prox_sgd_rows_") + name_of(storage_);
    Launch launch{kernel + (towards_start_ ? "_start" : ""), towards_start_,
                  static_cast<uint32_t>(pieces_), kThreads, std::move(table)};
    launch.coupled_rows = true;
    launches_.push_back(std::move(launch));
    reset();
  }

  void reset() {
    std::memset(static_cast<void*>(&header_), 0, sizeof header_);  // padding is copied, too
    sets_.clear();
    members_.clear();
    listed_.clear();
    pieces_ = 0;
  }

  Storage storage_;
  bool towards_start_;
  const std::vector<RowOptions>& options_;
  int64_t capacity_;
  Header<C> header_;
  std::vector<SetEntry> sets_;
  std::vector<MemberEntry> members_;
  std::vector<size_t> listed_;  // indices of the options of the table's groups, which are unlike
  int64_t pieces_ = 0;
  std::vector<Launch> launches_;
};

}  // namespace

RowLimits row_limits() { return {kRowSlots<double> - 1, kMostGroups}; }

std::vector<Launch> plan_rows(const std::vector<RowSet>& sets,
                              const std::vector<RowOptions>& options, Storage storage,
                              int64_t capacity) {
  return with_storage(storage, [&](auto tag) {
    std::vector<Launch> launches;
    for (const bool towards_start : {false, true}) {
      Plan<TypesOf<decltype(tag)::storage>> plan(storage, towards_start, options, capacity);
      for (const RowSet& set : sets) {
        if (has_start(set) == towards_start) plan.add(set);
      }
      for (Launch& launch : plan.finish()) launches.push_back(std::move(launch));
    }
    return launches;
  });
}

}  // namespace prox_sgd::cuda
