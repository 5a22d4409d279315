// Kernel and launcher of the template op: copies `size` values. No torch here, so that a host
// emulation of pc/device.cuh can run it without a GPU.
#pragma once

#include <cstdint>

#include "pc/device.cuh"

namespace pc {

// x, out: [size]
template <typename scalar_t>
__global__ void identity_kernel(const scalar_t* x, scalar_t* out, int64_t size) {
  for (int64_t i = thread_index(); i < size; i += thread_count()) {
    out[i] = x[i];
  }
}

template <typename scalar_t>
cudaError_t launch_identity(const scalar_t* x, scalar_t* out, int64_t size, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return launch(identity_kernel<scalar_t>, size, stream, x, out, size);
}

}  // namespace pc
