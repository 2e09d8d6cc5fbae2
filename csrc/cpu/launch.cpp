// Runs a plan of elements on threads.
#include <algorithm>

#include "../math/update.h"
#include "../prox_sgd.h"
#include "elements.h"
#include "plan.h"
#include "threads.h"

#if defined(_OPENMP)
#include <dlfcn.h>
#endif

namespace prox_sgd::cpu {
namespace {

template <typename C>
void run(const std::vector<Operands>& operands, Storage storage, const Options& options,
         int threads) {
  const Coefficients<C> c = coefficients<C>(options);
  const bool counts = std::any_of(operands.begin(), operands.end(),
                                  [](const Operands& o) { return o.num_zeros != nullptr; });
  const bool towards_start = !operands.empty() && operands.front().start != nullptr;
  const Kernel kernel = kernel_for(storage, c.mode, simplest_form(c), counts, towards_start);
  const Plan plan(operands, threads);
  int64_t elements = 0;
  for (const Operands& o : operands) elements += o.numel;
  threads = worthwhile_threads(threads, plan.chunks(), elements);
  run_chunks(plan.chunks(), threads, [&](int64_t chunk, int) {
    plan.visit(chunk, [&](const Plan::Range& range) {
      const Operands& o = operands[range.tensor];
      const int64_t zeros = kernel(o, &c, range.begin, range.end);
      if (o.num_zeros != nullptr) __atomic_fetch_add(o.num_zeros, zeros, __ATOMIC_RELAXED);
    });
  });
}

}  // namespace

void prox_sgd(const std::vector<Operands>& operands, Storage storage, const Options& options,
              int threads) {
  if (storage == Storage::float64) {
    run<double>(operands, storage, options, threads);
  } else {
    run<float>(operands, storage, options, threads);
  }
}

const char* openmp_runtime() {
#if defined(_OPENMP)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) && info.dli_fname) {
    return info.dli_fname;
  }
  return "unknown";
#else
  return "none";
#endif
}

}  // namespace prox_sgd::cpu
