// The running average of points of known dot products that point its way: one block, since each
// step depends on the one before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pc/device.cuh"

namespace pc {

// gram: [B, B], kept, weights, taken: [B]; shared: [B] numbers and [B] flags
template <typename T>
PC_KERNEL void gram_filter_kernel(const T* gram, const bool* kept, double threshold, T* weights,
                                  T* taken, int batch) {
  double* products = shared_memory<double>();  // with the average
  bool* takes = reinterpret_cast<bool*>(products + batch);
  for (int i = thread(); i < batch; i += threads()) takes[i] = false;
  sync();
  int first = -1, agree = 0;
  double sq_norm = 0;
  // All threads come to the same decisions.
  for (int b = 0; b < batch; ++b) {
    if (!kept[b]) continue;
    const T* row = gram + static_cast<int64_t>(b) * batch;
    const double norm = sqrt(static_cast<double>(row[b]));
    const bool starts = first < 0;
    const double product = starts ? 0.0 : products[b], scale = sqrt(sq_norm) * norm;
    if (!starts && !(1 - (scale == 0 ? 0.0 : product / scale) <= threshold)) continue;
    for (int i = b + 1 + thread(); i < batch; i += threads()) {
      products[i] = starts ? row[i] : (products[i] + row[i]) / 2;
    }
    if (thread() == 0) takes[b] = true;
    sq_norm = starts ? norm * norm : (sq_norm + 2 * product + norm * norm) / 4;
    first = starts ? b : first;
    agree += starts ? 0 : 1;
    sync();
  }
  for (int i = thread(); i < batch; i += threads()) {
    taken[i] = static_cast<T>(agree > 0 && takes[i] ? 1 : 0);
  }
  if (thread() != 0) return;
  double weight = 1;
  for (int b = batch - 1; b >= 0; --b) {
    const bool counts = agree > 0 && takes[b];
    if (counts && b > first) weight /= 2;
    weights[b] = static_cast<T>(counts ? weight : 0.0);
  }
}

template <typename T>
cudaError_t launch_gram_filter(const T* gram, const bool* kept, double threshold, T* weights,
                               T* taken, int64_t batch, cudaStream_t stream) {
  constexpr int64_t kMostBatch = 6000, kMostWarps = 16;
  if (batch > kMostBatch) return cudaErrorInvalidValue;
  const int64_t warps = std::clamp((batch + 31) / 32, int64_t{1}, kMostWarps);
  const int64_t bytes = batch * static_cast<int64_t>(sizeof(double) + sizeof(bool));
  return launch(gram_filter_kernel<T>, 1, static_cast<int>(32 * warps), bytes, stream, gram, kept,
                threshold, weights, taken, static_cast<int>(batch));
}

}  // namespace pc
