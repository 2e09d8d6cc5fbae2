// Runs a plan on threads.
#include <algorithm>
#include <atomic>

#include "../math/update.h"
#include "../prox_sgd.h"
#include "elements.h"
#include "plan.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <dlfcn.h>
#include <omp.h>
#endif

namespace prox_sgd::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // as torch's own elementwise operations

// How a thread's arithmetic treats subnormals. torch.set_flush_denormal changes only the thread
// that calls it; the threads of the pool take over the caller's mode, so that the bits don't depend
// on the number of threads.
class FloatingPointMode {
 public:
#if defined(__SSE2__)
  void apply() const { _mm_setcsr(control_); }

 private:
  unsigned control_ = _mm_getcsr();
#elif defined(__aarch64__)
  FloatingPointMode() { asm volatile("mrs %0, fpcr" : "=r"(control_)); }
  void apply() const { asm volatile("msr fpcr, %0" : : "r"(control_)); }

 private:
  uint64_t control_ = 0;
#else
  void apply() const {}
#endif
};

// Calls run_chunk(index) for all chunks, in at most `threads` threads. A thread takes the next
// chunk when it is free: one that the system holds up delays one chunk, not a fixed share of them.
template <typename RunChunk>
void run_chunks(int64_t chunks, int threads, RunChunk&& run_chunk) {
#if defined(_OPENMP)
  if (threads > 1) {
    std::atomic<int64_t> next{0};
    const FloatingPointMode callers;
#pragma omp parallel num_threads(threads)
    {
      const FloatingPointMode own;
      callers.apply();
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        run_chunk(chunk);
      }
      own.apply();
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) run_chunk(chunk);
}

template <typename C>
void run(const std::vector<Operands>& operands, Storage storage, const Options& options,
         int threads) {
  const Coefficients<C> c = coefficients<C>(options);
  const bool counts = std::any_of(operands.begin(), operands.end(),
                                  [](const Operands& o) { return o.num_zeros != nullptr; });
  const bool towards_start = !operands.empty() && operands.front().start != nullptr;
  const Kernel kernel = kernel_for(storage, c.mode, simplest_form(c), counts, towards_start);
  const Plan plan(operands, threads);
  // To wake a thread costs as much as some ten thousand elements, and far more on a busy machine.
  int64_t elements = 0;
  for (const Operands& o : operands) elements += o.numel;
  const int64_t worthwhile = std::min(plan.chunks(), 1 + elements / kElementsPerThread);
  threads = static_cast<int>(std::min<int64_t>(threads, worthwhile));
  run_chunks(plan.chunks(), threads, [&](int64_t chunk) {
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
