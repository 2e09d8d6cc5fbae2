// Lays parameters out in the tables of as many launches as they need.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "../prox_sgd.h"
#include "params.h"

namespace prox_sgd::cuda {
namespace {

template <typename T>
std::vector<Launch> plan_for(const std::vector<Operands>& operands, Storage storage,
                             const Options& options, const DeviceValues& values, int64_t capacity) {
  using Table = Parameters<typename T::Compute>;
  constexpr int64_t kMost = Table::kCapacity;
  capacity = capacity > 0 ? std::min(capacity, kMost) : kMost;

  std::vector<Launch> launches;
  const auto table = std::make_unique<Table>();
  std::memset(static_cast<void*>(table.get()), 0, sizeof *table);  // padding is copied, too
  table->coefficients = coefficients<typename T::Compute>(options);
  table->scheduled = scheduled(options);
  table->values = values;
  table->reads_device = values.lr || values.l1 || values.grad_scale || values.grad_coefficient;

  const bool towards_start = !operands.empty() && operands.front().start != nullptr;

  const auto flush = [&] {
    if (table->count == 0) return;
    const int64_t blocks = (table->units + kUnitsPerBlock - 1) / kUnitsPerBlock;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::length_error("ProxSGD: a bucket of tensors too large for one CUDA grid");
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(table.get());
    launches.push_back(
        {std::string("prox_sgd_") + name_of(storage) + (towards_start ? "_start" : ""),
         towards_start, static_cast<uint32_t>(blocks), kThreads,
         std::vector<unsigned char>(bytes, bytes + sizeof *table)});
    table->units = 0;
    table->count = 0;
  };

  for (const Operands& o : operands) {
    if (o.numel == 0) continue;
    if (table->count == capacity) flush();
    Entry& entry = table->entries[table->count++];
    entry = {o, table->units};
    // Without momentum the kernel never uses the buffer's address, but adds to it: undefined for
    // null.
    if (o.momentum_buffer == nullptr) entry.operands.momentum_buffer = o.param;
    table->units += (o.numel + T::per_unit - 1) / T::per_unit;
  }
  flush();
  return launches;
}

}  // namespace

std::vector<Launch> plan(const std::vector<Operands>& operands, Storage storage,
                         const Options& options, const DeviceValues& values, int64_t capacity) {
  return with_storage(storage, [&](auto tag) {
    using T = TypesOf<decltype(tag)::storage>;
    return plan_for<T>(operands, storage, options, values, capacity);
  });
}

}  // namespace prox_sgd::cuda
