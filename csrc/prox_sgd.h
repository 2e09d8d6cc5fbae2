// Plain structs and entry points that the CPU side, the CUDA side and the bindings share.
// Nothing in here knows Python or torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace prox_sgd {

enum class DType : int32_t { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// What the tensors of one parameter are stored in: a kernel each. Where one type is named, it is
// that of parameter, gradient and momentum alike. A master is a float32 copy of a parameter of 16
// bits, which the step reads and writes; the parameter is then only written, and the momentum is
// float32 where no other type is named.
enum class Kind : int32_t {
  float32 = 0,
  float64 = 1,
  float16 = 2,
  bfloat16 = 3,
  float32_momentum_bfloat16 = 4,
  bfloat16_master = 5,
  bfloat16_master_momentum_bfloat16 = 6,
  float16_master = 7,
};

constexpr const char* kKindNames[] = {
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float32_momentum_bfloat16",
    "bfloat16_master",
    "bfloat16_master_momentum_bfloat16",
    "float16_master",
};

// What a bucket does with its momentum: no buffer at all, a buffer that is written and not read
// (the first step), or one that is read and written. A property of a bucket, never of one tensor.
enum class Momentum : int32_t { none = 0, first = 1, running = 2 };

// One parameter with what its update reads and writes: tensors of the same shape and dense layout,
// so that all are plain arrays of numel elements in one common order.
struct Operands {
  void* param;
  const void* grad;
  void* momentum;  // null where Momentum is none
  void* master;    // null for kinds without one
  int64_t numel;
  int64_t* zeros;  // where to add the number of zeros in the new parameter; null for nowhere
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
  bool proximal;      // l2_mode="proximal"; coupled otherwise
  bool frozen_zeros;  // what is 0 stays 0, and l1 is not applied
  float grad_scale;   // gradients are divided by it, and multiplied by the coefficient
  float grad_coefficient;
  bool first;  // the bucket's first step: its momentum buffers hold nothing yet

  Momentum mode() const {
    if (momentum == 0.0) return Momentum::none;
    return first ? Momentum::first : Momentum::running;
  }
};

namespace cpu {

// The instruction sets that the kernel is compiled for, lowest first.
enum class Simd : int32_t { baseline = 0, avx2 = 1 };

bool simd_supported(Simd level);  // compiled in, and this processor has it

// Updates every parameter in one pass over memory, in at most `threads` threads.
void prox_sgd(const std::vector<Operands>& operands, Kind kind, const Options& options, Simd level,
              int threads);

// The OpenMP runtime in use: its path, or "none" for a build without OpenMP.
const char* openmp_runtime();

}  // namespace cpu

namespace cuda {

// Values in device memory that the kernel reads when it runs, so that the host needn't wait for
// them and a captured graph follows them. Null where Options holds the value.
struct DeviceValues {
  const double* lr = nullptr;
  const double* l1 = nullptr;
  const float* grad_scale = nullptr;
  const float* grad_coefficient = nullptr;
  const float* found_inf = nullptr;  // the step changes nothing where it isn't 0
};

// Launches the update on `stream` of device `device`; returns without waiting. Throws
// std::runtime_error with CUDA's own words if a launch is refused.
void prox_sgd(const std::vector<Operands>& operands, Kind kind, const Options& options,
              const DeviceValues& values, int device, void* stream);

// Why this build cannot run on `device`, or an empty string where it can. Found out once a device,
// unless it is for want of something that may come back, as memory.
std::string why_unusable(int device);

int toolkit_version();  // CUDART_VERSION of the build, 0 without CUDA

}  // namespace cuda
}  // namespace prox_sgd
