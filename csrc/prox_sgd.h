// Plain structs and entry points that the CPU side, the CUDA side and the bindings share.
// Nothing in here knows Python or torch.
#pragma once

#include <cstdint>
#include <vector>

namespace prox_sgd {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// What a bucket does with its momentum: no buffer at all, a buffer that is written and not read
// (the first step), or one that is read and written. A property of a bucket, never of one tensor.
enum class Momentum : int32_t { none = 0, first = 1, running = 2 };

// One parameter with its gradient and momentum buffer: the same shape, dtype and dense layout, so
// all three are plain arrays of numel elements in one common order.
struct Triple {
  void* param;
  const void* grad;
  void* momentum;  // null where Momentum is none
  int64_t numel;
};

// The options of a parameter group as the user gives them.
struct Options {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double l1;
  bool nesterov;
  bool maximize;
  bool proximal;  // l2_mode="proximal"; coupled otherwise
  bool first;     // the bucket's first step: its momentum buffers hold nothing yet

  Momentum mode() const {
    if (momentum == 0.0) return Momentum::none;
    return first ? Momentum::first : Momentum::running;
  }
};

namespace cpu {

// The instruction sets that the kernel is compiled for, lowest first.
enum class Simd : int32_t { baseline = 0, avx2 = 1 };

bool simd_supported(Simd level);  // compiled in, and this processor has it

// Updates every triple in one pass over memory, in at most `threads` threads.
void prox_sgd(const std::vector<Triple>& triples, DType dtype, const Options& options, Simd level,
              int threads);

// The OpenMP runtime in use: its path, or "none" for a build without OpenMP.
const char* openmp_runtime();

}  // namespace cpu

namespace cuda {

// Launches the update on `stream` of device `device`; returns without waiting. Throws
// std::runtime_error with CUDA's own words if a launch is refused.
void prox_sgd(const std::vector<Triple>& triples, DType dtype, const Options& options, int device,
              void* stream);

// Why this build cannot run on `device`, or an empty string where it can. Asked once a device.
const char* why_unusable(int device);

int toolkit_version();  // CUDART_VERSION of the build, 0 without CUDA

}  // namespace cuda
}  // namespace prox_sgd
