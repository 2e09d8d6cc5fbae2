// Launches a plan: the only place that handles the CUDA runtime's device, stream and status.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../prox_sgd.h"
#include "row_table.h"

namespace prox_sgd::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: leave nothing for the next call to find
  throw std::runtime_error(std::string("ProxSGD: ") + what + ": " + cudaGetErrorString(status));
}

// A function of the driver, which the CUDA runtime has loaded.
template <typename Function>
Function* driver_function(const char* name) {
  void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Function*>(dlsym(library, name)) : nullptr;
}

// Makes a device current for a scope, and puts the context before it back, or none.
// cudaSetDevice(previous device) would make a context there, which takes half a gigabyte.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    static const auto get_context = driver_function<int(void**)>("cuCtxGetCurrent");
    if (get_context == nullptr || set_context() == nullptr || get_context(&previous_) != 0) {
      throw std::runtime_error("ProxSGD: the NVIDIA driver does not tell its current context");
    }
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { set_context()(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static int (*set_context())(void*) {
    static const auto function = driver_function<int(void*)>("cuCtxSetCurrent");
    return function;
  }

  void* previous_ = nullptr;
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
    const void* kernel = kernel_address(Storage::float32, false, sizeof(Table<float, kSmallTable>));
    status = cudaFuncGetAttributes(&attributes, kernel);
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
    const size_t bytes = launch.parameters.size();
    const auto address = launch.coupled_rows ? row_kernel_address : kernel_address;
    const void* const kernel = address(storage, launch.towards_start, bytes);
    if (kernel == nullptr) {
      throw std::logic_error("ProxSGD: plan and kernel were built for tables of different sizes");
    }
    void* arguments[] = {const_cast<unsigned char*>(launch.parameters.data())};
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
