// What kernels use of CUDA beyond plain C++, so that they name no intrinsic themselves.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace pc {

// One pass of a grid-stride loop at this size fills any GPU of today.
constexpr int64_t kMaxBlocks = 4096;
constexpr int kThreads = 256;

inline __device__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

inline __device__ int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Starts kernel(args...) with up to a thread per item; items > 0, for CUDA refuses empty grids.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t items, cudaStream_t stream, Args... args) {
  const int64_t blocks = std::min((items + kThreads - 1) / kThreads, kMaxBlocks);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace pc
