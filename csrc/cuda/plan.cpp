#include "plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "kernel.h"

namespace prox_sgd::cuda {
namespace {

const char* kernel_name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "prox_sgd_float32";
    case DType::float64:
      return "prox_sgd_float64";
    case DType::float16:
      return "prox_sgd_float16";
    default:
      return "prox_sgd_bfloat16";
  }
}

int64_t elements_per_unit(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return kUnitBytes / 4;
    case DType::float64:
      return kUnitBytes / 8;
    default:
      return kUnitBytes / 2;
  }
}

template <typename C>
std::vector<Launch> plan_in(const std::vector<Triple>& triples, DType dtype, const Options& options,
                            int64_t capacity) {
  constexpr int64_t kMost = Parameters<C>::kCapacity;
  capacity = capacity > 0 ? std::min(capacity, kMost) : kMost;

  std::vector<Launch> launches;
  const auto table = std::make_unique<Parameters<C>>();
  std::memset(static_cast<void*>(table.get()), 0, sizeof *table);
  table->coefficients = coefficients<C>(options);

  const auto flush = [&] {
    if (table->count == 0) return;
    const int64_t blocks = (table->units + kUnitsPerBlock - 1) / kUnitsPerBlock;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::length_error("ProxSGD: a bucket of tensors too large for one CUDA grid");
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(table.get());
    launches.push_back({kernel_name(dtype), static_cast<uint32_t>(blocks), kThreads,
                        std::vector<unsigned char>(bytes, bytes + sizeof *table)});
    table->units = 0;
    table->count = 0;
  };

  const int64_t per_unit = elements_per_unit(dtype);
  for (const Triple& triple : triples) {
    if (triple.numel == 0) continue;
    if (table->count == capacity) flush();
    table->entries[table->count++] = {triple.param, triple.grad, triple.momentum, triple.numel,
                                      table->units};
    table->units += (triple.numel + per_unit - 1) / per_unit;
  }
  flush();
  return launches;
}

}  // namespace

std::vector<Launch> plan(const std::vector<Triple>& triples, DType dtype, const Options& options,
                         int64_t capacity) {
  return dtype == DType::float64 ? plan_in<double>(triples, dtype, options, capacity)
                                 : plan_in<float>(triples, dtype, options, capacity);
}

}  // namespace prox_sgd::cuda
