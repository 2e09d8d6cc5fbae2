// Stands in for elements.cu, rows.cu and launch.cu in a build without CUDA.
#include <stdexcept>

#include "../prox_sgd.h"
#include "build_info.h"

namespace prox_sgd::cuda {

void launch(const std::vector<Launch>&, Storage, int, void*) {
  throw std::runtime_error("ProxSGD: built without CUDA");
}

std::string why_unusable(int) {
  return "resnet_reg_ext was built without CUDA (" PROX_SGD_CUDA_LEFT_OUT
         "): reinstall it with RESNET_REG_EXT_CUDA=1";
}

int toolkit_version() { return 0; }

int driver_version() { return 0; }

}  // namespace prox_sgd::cuda
