// The stand-in's functions, and the kernels' addresses, which elements.cu has otherwise. Devices 0
// and 1 exist. A context is a number above 0: that of its device, plus 1.
#include <cuda_runtime.h>

#include <exception>

#include "cuda/row_table.h"

extern "C" {
long current = 0;       // the thread's context; 0: none
int has_context[2];     // by device
int launches;           // so far
int refused_from = -1;  // the launch that is refused, and all after it
int last_device, last_grid, last_block;
void* last_stream;
const void* last_kernel;
unsigned char last_first_byte;

int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(current);
  return 0;
}
int cuCtxSetCurrent(void* context) {
  current = reinterpret_cast<long>(context);
  return 0;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the stand-in refuses"; }
cudaError_t cudaSetDevice(int device) {
  has_context[device] = 1;
  current = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return current == 1 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  *out = {3, 5};
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  if (launches == refused_from) return cudaErrorLaunchFailure;
  ++launches;
  last_device = static_cast<int>(current) - 1;
  last_kernel = kernel;
  last_grid = static_cast<int>(grid.x);
  last_block = static_cast<int>(block.x);
  last_stream = stream;
  last_first_byte = **reinterpret_cast<unsigned char**>(arguments);
  return cudaSuccess;
}
}

namespace prox_sgd::cuda {
const void* kernel_address(Storage, bool, size_t table_bytes) {
  return table_bytes < 3 ? nullptr : reinterpret_cast<const void*>(table_bytes);
}
const void* row_kernel_address(Storage storage, bool towards_start, size_t table_bytes) {
  return kernel_address(storage, false, table_bytes + (towards_start ? 3000 : 1000));
}
}  // namespace prox_sgd::cuda

// What Python calls: two launches of tables of so many bytes on a device and a stream; what was
// thrown.
extern "C" const char* launch_two(int device, void* stream, int bytes) {
  static std::string thrown;
  thrown.clear();
  const std::vector<unsigned char> table(static_cast<size_t>(bytes), 42);
  try {
    prox_sgd::cuda::launch({{"first", false, 5, 256, table}, {"second", false, 7, 256, table}},
                           prox_sgd::Storage::float32, device, stream);
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  return thrown.c_str();
}
// A launch of coupled rows.
extern "C" void launch_rows(int device, void* stream, int bytes) {
  prox_sgd::cuda::Launch launch{"rows", true, 3, 256, {}};
  launch.parameters.resize(static_cast<size_t>(bytes));
  launch.coupled_rows = true;
  prox_sgd::cuda::launch({launch}, prox_sgd::Storage::float32, device, stream);
}
extern "C" const char* why_unusable(int device) {
  static std::string why;
  why = prox_sgd::cuda::why_unusable(device);
  return why.c_str();
}
