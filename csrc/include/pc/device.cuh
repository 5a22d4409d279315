// The parts of a GPU that kernels use beyond plain C++. Kernels name no intrinsic themselves, so
// that the same source runs on the host too, where pc/emulation.h has the same names.
#pragma once

#if !defined(__CUDACC__)
#include "pc/emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define PC_KERNEL __global__
#define PC_DEVICE __device__ __forceinline__
#define PC_UNROLL _Pragma("unroll")

namespace pc {

using Half = __half;
using BFloat16 = __nv_bfloat16;

PC_DEVICE float to_float(Half value) { return __half2float(value); }
PC_DEVICE float to_float(BFloat16 value) { return __bfloat162float(value); }

PC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
PC_DEVICE int threads() { return static_cast<int>(blockDim.x); }
PC_DEVICE int64_t block() { return blockIdx.x; }
PC_DEVICE int64_t blocks() { return gridDim.x; }

// Over the whole grid.
PC_DEVICE int64_t thread_index() { return block() * threads() + thread(); }
PC_DEVICE int64_t thread_count() { return blocks() * threads(); }

// The memory of the block from its launch, aligned to 16 bytes, in no known state.
template <typename T>
PC_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

// All threads of the block, or of the warp, come to the same call of these.
PC_DEVICE void sync() { __syncthreads(); }
PC_DEVICE void sync_warp() { __syncwarp(); }

constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
PC_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

// That of lane `from`.
template <typename T>
PC_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}

// The last lanes keep their own.
template <typename T>
PC_DEVICE T shuffle_down(T value, int by) {
  return __shfl_down_sync(kAllLanes, value, by);
}

// Whether it is true for any lane of the warp.
PC_DEVICE bool any(bool value) { return __any_sync(kAllLanes, value); }

// A bit for each lane of the warp, the first lane's the lowest: whether it is true there.
PC_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }

// The index of the lowest bit that is set; there must be one.
PC_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Fails on the device unless it is true, as torch does for an index out of range: the host learns
// of it when it next waits.
PC_DEVICE void expect(bool fine, const char* what) {
  if (!fine) __assert_fail(what, "pycoherence", 0, "kernel");
}

// Copies 4, 8 or 16 aligned bytes at some time before wait_copies.
template <int bytes>
PC_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(bytes)
                 : "memory");
  }
}

// Ends a group of copies of this thread.
PC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last `left`; other threads see the copies after sync().
template <int left>
PC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// d += a b, of shapes [16, 8], [16, 16] and [16, 8], by the lanes of a warp together:
// `mma.m16n8k16` in the documentation of PTX tells which lane holds what.
template <typename T>
PC_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
PC_DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
PC_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts kernel(args...) on blocks of `threads`, a multiple of 32. No blocks are no work, not an
// error.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  constexpr int64_t kMostBlocks = INT32_MAX, kPlainShared = 48 * 1024;
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > kMostBlocks || threads % 32 != 0 || shared_bytes > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  if (shared_bytes > kPlainShared) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace pc

#endif
