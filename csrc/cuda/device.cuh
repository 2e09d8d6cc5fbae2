// What the kernels of elements and of coupled rows share.
#pragma once

#include "../math/update.h"
#include "params.h"

namespace prox_sgd::cuda {

// Adds every thread's number to a counter, with one atomic addition. All threads of the block must
// call it.
__device__ __forceinline__ void add_to(int64_t* counter, int number) {
  __shared__ int of_warps[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, distance);
  }
  __syncthreads();  // the first thread has read the last call's
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = number;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = 0;
  for (const int of_warp : of_warps) sum += of_warp;
  if (sum != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(sum));
  }
}

__device__ __forceinline__ double number_at(const void* address, DType dtype) {
  switch (dtype) {
    case DType::float64:
      return *static_cast<const double*>(address);
    case DType::float32:
      return *static_cast<const float*>(address);
    case DType::float16:
      return load(*static_cast<const Half*>(address));
    default:
      return load(*static_cast<const BFloat16*>(address));
  }
}

// A group's scheduled options with the values that device memory holds.
template <typename C>
__device__ __forceinline__ ScheduledOptions scheduled_now(const Group<C>& group) {
  const DeviceValues& from = group.values;
  ScheduledOptions scheduled = group.scheduled;
  if (from.lr) scheduled.lr = number_at(from.lr, from.lr_dtype);
  if (from.l1) scheduled.l1 = number_at(from.l1, from.l1_dtype);
  if (from.grad_scale) scheduled.grad_scale = *from.grad_scale;
  if (from.grad_coefficient) scheduled.grad_coefficient = *from.grad_coefficient;
  return scheduled;
}

}  // namespace prox_sgd::cuda
