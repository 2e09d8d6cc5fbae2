// Runs a plan's chunks on threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace prox_sgd::cpu {

constexpr int64_t kElementsPerThread = 32768;  // as torch's own elementwise operations

// The number of threads that is worth its cost: to wake one costs as much as some ten thousand
// elements, and far more on a busy machine.
inline int worthwhile_threads(int threads, int64_t chunks, int64_t elements) {
  const int64_t most = std::min(chunks, 1 + elements / kElementsPerThread);
  return static_cast<int>(std::min<int64_t>(threads, most));
}

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

// Calls run_chunk(index, thread) for all chunks, in at most `threads` threads. A thread takes the
// next chunk when it is free: one that the system holds up delays one chunk, not a fixed share.
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
        run_chunk(chunk, omp_get_thread_num());
      }
      own.apply();
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) run_chunk(chunk, 0);
}

}  // namespace prox_sgd::cpu
