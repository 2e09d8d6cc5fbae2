// Launches a plan: the only place that handles the CUDA runtime's device, stream and status.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../prox_sgd.h"
#include "params.h"

namespace prox_sgd::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: leave nothing for the next call to find
  throw std::runtime_error(std::string("ProxSGD: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why no kernel can run on a device; empty where one can. `lasting`: it holds as long as the
// process lives, unlike a lack of memory.
struct Obstacle {
  std::string reason;
  bool lasting = true;
};

Obstacle find_obstacle(int device) {
  const int driver = driver_version();
  if (driver == 0) return {"no NVIDIA driver is installed"};
  // Minor versions of one CUDA are compatible; large kernel parameters need a driver of 12.1.
  const int needed =
      CUDART_VERSION >= 12010 && CUDART_VERSION < 13000 ? 12010 : CUDART_VERSION / 1000 * 1000;
  if (driver < needed) {
    return {"the NVIDIA driver supports CUDA " + version(driver) + ", this build needs " +
            version(needed) + ": update the driver"};
  }
  cudaError_t status = cudaSuccess;
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel_address(Storage::float32, false));
    cudaGetLastError();
  } catch (const std::exception& error) {
    return {error.what(), false};
  }
  if (status == cudaSuccess) return {};
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
    return {cudaGetErrorString(status), false};
  }
  cudaDeviceProp properties;
  std::string architecture;
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    architecture = " (compute capability " + std::to_string(properties.major) + "." +
                   std::to_string(properties.minor) + ")";
  }
  return {"no kernel of this build runs on CUDA device " + std::to_string(device) + architecture +
          ": reinstall with TORCH_CUDA_ARCH_LIST naming its architecture"};
}

}  // namespace

void launch(const std::vector<Launch>& launches, Storage storage, int device, void* stream) {
  if (launches.empty()) return;
  const DeviceGuard guard(device);
  for (const Launch& launch : launches) {
    if (launch.parameters.size() != parameter_bytes(storage)) {
      throw std::logic_error("ProxSGD: plan and kernel were built for tables of different sizes");
    }
    void* arguments[] = {const_cast<unsigned char*>(launch.parameters.data())};
    const void* const kernel = kernel_address(storage, launch.towards_start);
    check(cudaLaunchKernel(kernel, dim3(launch.grid), dim3(launch.block), arguments, 0,
                           static_cast<cudaStream_t>(stream)),
          launch.kernel.c_str());
  }
}

std::string why_unusable(int device) {
  static std::mutex mutex;
  static std::map<int, Obstacle> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto [found, asked_first] = known.try_emplace(device);
  if (asked_first || !found->second.lasting) found->second = find_obstacle(device);
  return found->second.reason;
}

int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return driver;
}

}  // namespace prox_sgd::cuda
