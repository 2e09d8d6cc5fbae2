// Runs the plan on threads.
#include "../prox_sgd.h"

#include <atomic>

#include "../prox_sgd_math.h"
#include "kernel.h"
#include "plan.h"

#if defined(_OPENMP)
#include <dlfcn.h>
#include <omp.h>
#endif

namespace prox_sgd::cpu {
namespace {

Kernel kernel_at(Simd level, DType dtype, Momentum mode) {
#if defined(PROX_SGD_HAS_AVX2)
  if (level == Simd::avx2) return avx2::kernel(dtype, mode);
#endif
  (void)level;
  return baseline::kernel(dtype, mode);
}

template <typename C>
void run(const std::vector<Triple>& triples, DType dtype, const Options& options, Simd level,
         int threads) {
  const Coefficients<C> c = coefficients<C>(options);
  const Kernel kernel = kernel_at(level, dtype, c.mode);
  const Plan plan(triples, threads);
  const auto run_chunk = [&](int64_t chunk) {
    plan.visit(chunk, [&](const Plan::Piece& piece) {
      kernel(triples[piece.tensor], &c, piece.begin, piece.end);
    });
  };
  if (threads > plan.chunks()) threads = static_cast<int>(plan.chunks());
#if defined(_OPENMP)
  if (threads > 1) {
    // Chunks are taken as threads come free: a thread that the system holds up delays one chunk,
    // not its whole share.
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < plan.chunks();) {
      run_chunk(chunk);
    }
    return;
  }
#endif
  for (int64_t chunk = 0; chunk < plan.chunks(); ++chunk) run_chunk(chunk);
}

}  // namespace

bool simd_supported(Simd level) {
  if (level == Simd::baseline) return true;
#if defined(PROX_SGD_HAS_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

void prox_sgd(const std::vector<Triple>& triples, DType dtype, const Options& options, Simd level,
              int threads) {
  if (dtype == DType::float64) {
    run<double>(triples, dtype, options, level, threads);
  } else {
    run<float>(triples, dtype, options, level, threads);
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
