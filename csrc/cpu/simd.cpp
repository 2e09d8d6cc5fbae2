// Which instruction set the CPU kernel uses: found out once, and open to be set.
#include <atomic>

#include "../prox_sgd.h"

#if defined(__x86_64__) || defined(__i386__)
#define PROX_SGD_X86
#include <cpuid.h>
#endif

namespace prox_sgd::cpu {
namespace {

// The fastest level of this build on this processor.
Simd fastest() {
#if defined(PROX_SGD_HAS_AVX2)
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool all = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return all ? Simd::avx2 : Simd::none;
#elif defined(PROX_SGD_X86)
  return Simd::none;
#else
  return Simd::portable;
#endif
}

std::atomic<Simd>& level_in_use() {
  static std::atomic<Simd> level{fastest()};
  return level;
}

}  // namespace

const char* name_of(Simd level) {
  switch (level) {
    case Simd::none:
      return "none";
    case Simd::portable:
      return "portable";
    default:
      return "avx2";
  }
}

std::vector<Simd> simd_levels() {
  const Simd level = fastest();
  if (level == Simd::none) return {Simd::none};
  return {Simd::none, level};
}

Simd simd_level() { return level_in_use(); }

void set_simd_level(Simd level) { level_in_use() = level; }

std::string why_unusable(Simd level) {
  if (level != Simd::none) return "";
  if (fastest() != Simd::none) return "the native CPU kernel is switched off: SIMD level 'none'";
#if defined(PROX_SGD_X86) && !defined(PROX_SGD_HAS_AVX2)
  return "the compiler of this build has no AVX2, which the native CPU kernel needs";
#else
  return "this processor lacks AVX2, FMA or F16C, which the native CPU kernel needs";
#endif
}

}  // namespace prox_sgd::cpu
