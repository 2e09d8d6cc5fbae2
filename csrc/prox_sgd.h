// Plain structs and entry points that the CPU side, the CUDA side and the bindings share.
// Nothing here knows Python or torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "storage.h"

namespace prox_sgd {

// How a step uses momentum buffers: there are none; they are only written, as the first step finds
// nothing in them; or they are read and written. All parameters of one call have the same mode.
enum class MomentumMode : int32_t { none = 0, first_step = 1, running = 2 };

// One parameter and its state: tensors of one shape and one dense memory layout, so that all are
// plain arrays of numel elements in a common order.
struct Operands {
  void* param;
  const void* grad;
  void* momentum_buffer;  // null where MomentumMode is none
  void* master_param;     // null for a storage without a master
  const void* start;      // what the penalties pull towards, stored as the master or else as the
                          // parameter; null: zero. All or none of the parameters of one call.
  int64_t numel;
  // The zeros of the new parameter are added to it, or with a start what equals it; null: not
  // counted.
  int64_t* num_zeros;
};

// A parameter group's options as the user gives them.
struct Options {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double l1;
  bool nesterov;
  bool maximize;
  bool proximal;           // l2_mode="proximal"; otherwise "coupled"
  bool frozen_zeros;       // what is 0, or at its start, stays, and l1 is not applied
  float grad_scale;        // gradients are divided by it (AMP),
  float grad_coefficient;  // and then multiplied by this (clipping)
  bool first_step;         // the momentum buffers hold nothing yet

  MomentumMode momentum_mode() const {
    if (momentum == 0.0) return MomentumMode::none;
    return first_step ? MomentumMode::first_step : MomentumMode::running;
  }

  // Calls visit(name, pointer to member) for every option: how other languages set them by name.
  template <typename Visit>
  static void for_each_field(Visit&& visit) {
    visit("lr", &Options::lr);
    visit("momentum", &Options::momentum);
    visit("dampening", &Options::dampening);
    visit("weight_decay", &Options::weight_decay);
    visit("l1", &Options::l1);
    visit("nesterov", &Options::nesterov);
    visit("maximize", &Options::maximize);
    visit("proximal", &Options::proximal);
    visit("frozen_zeros", &Options::frozen_zeros);
    visit("grad_scale", &Options::grad_scale);
    visit("grad_coefficient", &Options::grad_coefficient);
    visit("first_step", &Options::first_step);
  }
};

namespace cpu {

// `none` runs no kernel: the caller takes pure PyTorch. x86 has only the AVX2 kernel, any other
// processor only the portable one.
enum class Simd : int32_t { none = 0, portable = 1, avx2 = 2 };

const char* name_of(Simd level);
std::vector<Simd> simd_levels();  // that this build and this processor can run, the slowest first
Simd simd_level();                // in use: the fastest, unless another was set
void set_simd_level(Simd level);  // one of simd_levels()

// Why no kernel runs at a SIMD level; empty where one does.
std::string why_unusable(Simd level);

// Updates all parameters in one pass over memory, in at most `threads` threads. Expects a SIMD
// level other than `none`.
void prox_sgd(const std::vector<Operands>& operands, Storage storage, const Options& options,
              int threads);

// The path of the OpenMP runtime in use, or "none" for a build without OpenMP.
const char* openmp_runtime();

}  // namespace cpu

namespace cuda {

// Values in device memory that the kernel reads when it runs: the host needn't wait for them, and a
// captured CUDA graph follows them. Where one is null, Options holds the value.
struct DeviceValues {
  const void* lr = nullptr;
  const void* l1 = nullptr;
  const float* grad_scale = nullptr;
  const float* grad_coefficient = nullptr;
  const float* found_inf = nullptr;  // the step changes nothing where this isn't 0
  DType lr_dtype = DType::float64;
  DType l1_dtype = DType::float64;

  template <typename Visit>
  static void for_each_field(Visit&& visit) {
    visit("lr", &DeviceValues::lr);
    visit("l1", &DeviceValues::l1);
    visit("grad_scale", &DeviceValues::grad_scale);
    visit("grad_coefficient", &DeviceValues::grad_coefficient);
    visit("found_inf", &DeviceValues::found_inf);
    visit("lr_dtype", &DeviceValues::lr_dtype);
    visit("l1_dtype", &DeviceValues::l1_dtype);
  }
};

// Parameters of one storage on one device that have the same options.
struct Bucket {
  const std::vector<Operands>& operands;
  const Options& options;
  DeviceValues values;
};

struct Launch {
  std::string kernel;  // its name in the PTX
  bool towards_start;  // which of the storage's two kernels it is
  uint32_t grid;
  uint32_t block;
  std::vector<unsigned char> parameters;  // the kernel's one parameter, byte for byte
  bool coupled_rows = false;              // whether its kernel is that of coupled rows (rows.h)
};

// The launches that update all parameters: one, unless the table of the kernel's parameter is too
// small for all parameters or buckets. Plain C++: built and tested without CUDA. `capacity` bounds
// the parameters of one launch; 0: as many as there is room for. Throws std::length_error for more
// elements than a grid can cover.
std::vector<Launch> plan(const std::vector<Bucket>& buckets, Storage storage, int64_t capacity = 0);

// Launches a plan on `stream` of device `device` and returns without waiting. Throws
// std::runtime_error with CUDA's own words if a launch is refused.
void launch(const std::vector<Launch>& launches, Storage storage, int device, void* stream);

// Why this build can't run on `device`; empty where it can. Found out once a device, unless the
// reason may pass, such as a lack of memory.
std::string why_unusable(int device);

int toolkit_version();  // CUDART_VERSION of the build, 0 without CUDA
int driver_version();   // what the installed driver supports, 0 without a driver or without CUDA

}  // namespace cuda
}  // namespace prox_sgd
