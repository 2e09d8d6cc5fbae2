// Which launches a list of tensors needs. Plain C++: built, called and tested without CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../prox_sgd.h"

namespace prox_sgd::cuda {

struct Launch {
  std::string kernel;  // its name in the PTX
  uint32_t grid;
  uint32_t block;
  std::vector<unsigned char> parameters;  // the kernel's one parameter, byte for byte
};

// `capacity` bounds the tensors that one launch takes; 0 stands for all that the parameters hold.
std::vector<Launch> plan(const std::vector<Operands>& operands, Kind kind, const Options& options,
                         const DeviceValues& values, int64_t capacity = 0);

}  // namespace prox_sgd::cuda
