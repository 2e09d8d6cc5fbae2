// A stand-in for the CUDA runtime and driver, for launch.cu without either: records what is asked
// of it. tests/cuda/test_launch.py builds it as libcuda.so.1.
#pragma once
#include <cstddef>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

using cudaStream_t = struct Stream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned size) : x(size), y(1), z(1) {}
};
struct cudaFuncAttributes {};
struct cudaDeviceProp {
  int major, minor;
};

extern "C" {
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* kernel);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream);
}
