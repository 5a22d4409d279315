// The geometric median of points of known dot products, by a single block, so that it can stop when
// it is done without anyone waiting for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pc/device.cuh"

namespace pc {

// Sum over the lanes of a warp; each gets it.
PC_DEVICE double warp_sum(double value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Sum of f(i) over i below `size` by all threads of a block, in float64; each gets it.
// partial: [threads / 32], shared
template <typename F>
PC_DEVICE double block_sum(int size, double* partial, const F& f) {
  double sum = 0;
  for (int i = thread(); i < size; i += threads()) sum += f(i);
  sum = warp_sum(sum);
  sync();  // the last sum has been read
  if (thread() % 32 == 0) partial[thread() / 32] = sum;
  sync();
  double total = 0;
  for (int warp = 0; warp < threads() / 32; ++warp) total += partial[warp];
  return total;
}

// The state that all threads of the block know.
template <typename T>
struct Median {
  const T* gram;     // [B, B]
  const bool* kept;  // [B]
  int batch;
  double* weights;    // [B], shared
  double* distances;  // [B], shared
  double* partial;    // [threads / 32], shared

  // Fills `distances` with those from sum_i weights_i p_i, and returns their sum. Numbers of
  // weight zero are not looked at.
  PC_DEVICE double measure() const {
    sync();
    for (int i = thread() / 32; i < batch; i += threads() / 32) {
      double product = 0;
      for (int j = thread() % 32; j < batch; j += 32) {
        if (weights[j] != 0) product += weights[j] * gram[static_cast<int64_t>(i) * batch + j];
      }
      product = warp_sum(product);
      if (thread() % 32 == 0) distances[i] = product;
    }
    sync();
    const double norm = block_sum(
        batch, partial, [&](int i) { return weights[i] == 0 ? 0.0 : weights[i] * distances[i]; });
    return block_sum(batch, partial, [&](int i) {
      if (!kept[i]) return 0.0;
      const double own = gram[static_cast<int64_t>(i) * batch + i];
      const double square = own - 2 * distances[i] + norm;
      distances[i] = square < 0 ? 0 : sqrt(square);
      return distances[i];
    });
  }
};

// gram: [B, B], kept: [B], out: [B], ran: [1]; shared: [2, B] and a sum of each warp
template <typename T>
PC_KERNEL void gram_median_kernel(const T* gram, const bool* kept, T* out, T* ran, int batch,
                                  double nu, double tolerance, int64_t iterations) {
  double* shared = shared_memory<double>();
  const Median<T> median = {gram, kept, batch, shared, shared + batch, shared + 2 * batch};
  const double count = block_sum(batch, median.partial, [&](int i) { return kept[i] ? 1.0 : 0.0; });
  for (int i = thread(); i < batch; i += threads()) median.weights[i] = kept[i] ? 1 / count : 0.0;
  double before = median.measure();
  int64_t done = 0;
  bool enough = false;
  while (done < iterations && !enough) {
    const double sum = block_sum(batch, median.partial, [&](int i) {
      const double distance = median.distances[i];
      median.weights[i] = kept[i] ? 1 / (distance < nu ? nu : distance) : 0.0;
      return median.weights[i];
    });
    for (int i = thread(); i < batch; i += threads()) {
      if (kept[i]) median.weights[i] /= sum;
    }
    const double after = median.measure();
    enough = fabs(before - after) <= tolerance * before;
    before = after;
    ++done;
  }
  for (int i = thread(); i < batch; i += threads()) out[i] = static_cast<T>(median.weights[i]);
  if (thread() == 0) *ran = static_cast<T>(done);
}

template <typename T>
cudaError_t launch_gram_median(const T* gram, const bool* kept, T* out, T* ran, int64_t batch,
                               double nu, double tolerance, int64_t iterations,
                               cudaStream_t stream) {
  constexpr int64_t kMostBatch = 6000, kRowsOfWarp = 16;
  constexpr int64_t kMostWarps = 16;  // more would have too few registers
  if (batch > kMostBatch) return cudaErrorInvalidValue;
  const int64_t warps = std::clamp((batch + kRowsOfWarp - 1) / kRowsOfWarp, int64_t{1}, kMostWarps);
  const int64_t bytes = (2 * batch + warps) * static_cast<int64_t>(sizeof(double));
  return launch(gram_median_kernel<T>, 1, static_cast<int>(32 * warps), bytes, stream, gram, kept,
                out, ran, static_cast<int>(batch), nu, tolerance, iterations);
}

}  // namespace pc
