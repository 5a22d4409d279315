// Kernels of the tests' own that use all of pc/device.cuh, with mistakes planted in them.
#pragma once

#include <cstdint>

#include "pc/device.cuh"

namespace pc::tests {

enum class Plant { none, no_sync, no_wait, some_end, other_line, outside, outside_shared, order };

// out[b] = sum_i x[b, i], with the next tile on its way while this one is added.
// x: [B, size], out: [B]; shared: [2, threads] and a sum of each warp
template <Plant plant>
PC_KERNEL void sum_kernel(const float* x, float* out, int64_t size) {
  float* staged = shared_memory<float>();
  float* sums = staged + 2 * threads();
  const int64_t tiles = (size + threads() - 1) / threads();
  const auto stage = [&](int64_t tile) {
    const int64_t i = tile * threads() + thread();
    float* to = staged + tile % 2 * threads() + thread();
    if (i < size) {
      copy_async<4>(to, x + block() * size + i);
    } else {
      *to = 0;
    }
    commit_copies();
  };

  float sum = 0;
  stage(0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    stage(tile + 1);
    if (plant != Plant::no_wait) wait_copies<1>();
    if (plant != Plant::no_sync) sync();
    // What another thread has staged.
    sum += staged[tile % 2 * threads() + threads() - 1 - thread()];
    sync();
  }
  if (plant == Plant::some_end && thread() >= 40) return;
  if (plant == Plant::some_end) sync();
  if (plant == Plant::other_line && thread() < 40) {
    sync();
  } else if (plant == Plant::other_line) {
    sync();
  }
  for (int by = 16; by > 0; by /= 2) sum += shuffle_down(sum, by);
  if (thread() % 32 == 0) sums[thread() / 32] = sum;
  sync();
  if (thread() != 0) return;
  float total = 0;
  for (int warp = 0; warp < threads() / 32; ++warp) total += sums[warp];
  if (plant == Plant::order && block() > 0) total += out[block() - 1];
  out[plant == Plant::outside ? block() + 1 : block()] = total;
}

template <Plant plant = Plant::none>
cudaError_t launch_sum(const float* x, float* out, int64_t B, int64_t size, cudaStream_t stream) {
  constexpr int kThreads = 64;
  const int64_t numbers = 2 * kThreads + (plant == Plant::outside_shared ? 1 : kThreads / 32);
  return launch(sum_kernel<plant>, B, kThreads, numbers * sizeof(float), stream, x, out, size);
}

// What a lane gets from the lane `mask` away, and whether its warp has a negative one.
// x, out: [threads]; negative: [threads]
template <typename T>
PC_KERNEL void lanes_kernel(const T* x, T* out, int* negative, int mask) {
  out[thread()] = shuffle_xor(x[thread()], mask);
  negative[thread()] = any(x[thread()] < 0);
}

// Which lanes of the warp have a negative number, and the first such number, zero if there is none.
// x, which, first: [threads]
PC_KERNEL void votes_kernel(const float* x, uint32_t* which, float* first) {
  which[thread()] = ballot(x[thread()] < 0);
  const float found = shuffle(x[thread()], which[thread()] ? lowest_bit(which[thread()]) : 0);
  first[thread()] = which[thread()] ? found : 0;
}

// out = a b, of one warp.
// a: [16, 16], b: [16, 8], out: [16, 8]
template <typename T>
PC_KERNEL void mma_kernel(const T* a, const T* b, float* out) {
  const int group = thread() / 4, place = thread() % 4;
  T left[8], right[4];
  for (int i = 0; i < 8; ++i) {
    left[i] = a[(group + i / 2 % 2 * 8) * 16 + 2 * place + i % 2 + i / 4 * 8];
  }
  for (int i = 0; i < 4; ++i) right[i] = b[(2 * place + i % 2 + i / 2 * 8) * 8 + group];
  float d[4] = {};
  uint32_t packed_left[4], packed_right[2];
  memcpy(packed_left, left, sizeof left);
  memcpy(packed_right, right, sizeof right);
  mma<T>(d, packed_left, packed_right);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * place + i % 2] = d[i];
}

// out: [size]
template <typename T>
PC_KERNEL void to_float_kernel(const T* x, float* out, int64_t size) {
  for (int64_t i = thread_index(); i < size; i += thread_count()) out[i] = to_float(x[i]);
}

}  // namespace pc::tests
