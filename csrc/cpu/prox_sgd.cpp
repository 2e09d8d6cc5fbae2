// Runs the plan on threads.
#include "../prox_sgd.h"

#include <algorithm>
#include <atomic>

#include "../prox_sgd_math.h"
#include "kernel.h"
#include "plan.h"

#if defined(PROX_SGD_HAS_AVX2)
#include <cpuid.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <dlfcn.h>
#include <omp.h>
#endif

namespace prox_sgd::cpu {
namespace {

constexpr int64_t kElementsAThread = 32768;  // as many as torch's own operations take

Kernel kernel_at(Simd level, Kind kind, Momentum mode, Steps steps, bool counts) {
#if defined(PROX_SGD_HAS_AVX2)
  if (level == Simd::avx2) return avx2::kernel(kind, mode, steps, counts);
#endif
  (void)level;
  return baseline::kernel(kind, mode, steps, counts);
}

#if defined(PROX_SGD_HAS_AVX2)
bool is_zen_1_or_2() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool amd = __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
  return amd && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) == 0xf && (a >> 20 & 0xff) == 8;
}
#endif

// How many cache lines before its use to ask for memory: bandwidth times latency, so more on newer
// processors. Measured (bench/NOTES.md): Zen 5 is best with 20 to 64 and loses 3 to 15 % at 6; Zen
// 1 is best with 6, or 12 where storage types mix, and loses 9 % at 24. All others are untried, and
// taken for newer ones.
int64_t lines_ahead(Kind kind) {
#if defined(PROX_SGD_HAS_AVX2)
  static const bool old = is_zen_1_or_2();
  if (old) return kind <= Kind::bfloat16 ? 6 : 12;
#endif
  (void)kind;
  return 32;
}

// How a thread's arithmetic treats subnormals, which torch.set_flush_denormal sets for the thread
// that calls it. All threads of a step do as its caller's does: bits don't depend on their number.
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

template <typename C>
void run(const std::vector<Operands>& operands, Kind kind, const Options& options, Simd level,
         int threads) {
  const Coefficients<C> c = coefficients<C>(options);
  const bool counts = std::any_of(operands.begin(), operands.end(),
                                  [](const Operands& o) { return o.zeros != nullptr; });
  const Kernel kernel = kernel_at(level, kind, c.mode, steps(c), counts);
  const Plan plan(operands, threads);
  const int64_t ahead = lines_ahead(kind);
  const auto run_chunk = [&](int64_t chunk) {
    plan.visit(chunk, [&](const Plan::Piece& piece) {
      const Operands& o = operands[piece.tensor];
      const int64_t zeros = kernel(o, &c, piece.begin, piece.end, ahead);
      if (o.zeros != nullptr) __atomic_fetch_add(o.zeros, zeros, __ATOMIC_RELAXED);
    });
  };
  // Waking a thread costs as much as some ten thousand elements, and far more on a busy machine.
  int64_t elements = 0;
  for (const Operands& o : operands) elements += o.numel;
  const int64_t worthwhile = std::min(plan.chunks(), 1 + elements / kElementsAThread);
  if (threads > worthwhile) threads = static_cast<int>(worthwhile);
#if defined(_OPENMP)
  if (threads > 1) {
    // Chunks are taken as threads come free: a thread that the system holds up delays one chunk,
    // not its whole share.
    std::atomic<int64_t> next{0};
    const FloatingPointMode callers;
#pragma omp parallel num_threads(threads)
    {
      const FloatingPointMode own;
      callers.apply();
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < plan.chunks();) {
        run_chunk(chunk);
      }
      own.apply();
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
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

void prox_sgd(const std::vector<Operands>& operands, Kind kind, const Options& options, Simd level,
              int threads) {
  if (kind == Kind::float64) {
    run<double>(operands, kind, options, level, threads);
  } else {
    run<float>(operands, kind, options, level, threads);
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
