// Kernel and launcher of the template op: copies `size` values. No torch here, so that a host
// emulation of pc/device.cuh can run it without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pc/device.cuh"

namespace pc {

// x, out: [size]
template <typename scalar_t>
PC_KERNEL void identity_kernel(const scalar_t* x, scalar_t* out, int64_t size) {
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    out[i] = x[i];
  }
}

template <typename scalar_t>
cudaError_t launch_identity(const scalar_t* x, scalar_t* out, int64_t size, cudaStream_t stream) {
  // One pass of a grid-stride loop at this size fills any GPU of today.
  constexpr int64_t kMostBlocks = 4096, kThreads = 256;
  const int64_t blocks = std::min((size + kThreads - 1) / kThreads, kMostBlocks);
  return launch(identity_kernel<scalar_t>, blocks, kThreads, 0, stream, x, out, size);
}

}  // namespace pc
