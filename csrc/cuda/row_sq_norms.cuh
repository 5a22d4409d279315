// Kernel and launcher of row_sq_norms: a warp adds up the squares of one row of one of many
// matrices, in double.
#pragma once

#include <cstdint>

#include "pc/device.cuh"

namespace pc {

// The places of matrices: a parameter of the kernel, which may have 4 KiB.
template <typename T>
struct Matrices {
  static constexpr int most = 64;
  const T* rows[most];
  int64_t width[most], row_stride[most], column_stride[most];
};

template <typename T>
PC_DEVICE double to_double(T value) {
  if constexpr (sizeof(T) == 2) {
    return to_float(value);
  } else {
    return value;
  }
}

constexpr int kRowThreads = 256, kRowLanes = 32;
constexpr int kRowsAtOnce = kRowThreads / kRowLanes;

// The lane's share of the sum of squares of a row, in blocks, so that long sums keep their digits.
template <typename T>
PC_DEVICE double sum_of_squares(const T* row, int64_t width, int64_t stride, int lane) {
  constexpr int terms = 4, steps = 64;
  double total = 0;
  for (int64_t start = lane; start < width; start += terms * steps * kRowLanes) {
    double sums[terms] = {};
    for (int step = 0; step < steps; ++step) {
      const int64_t first = start + static_cast<int64_t>(step) * terms * kRowLanes;
      if (first >= width) break;
      PC_UNROLL
      for (int i = 0; i < terms; ++i) {
        const int64_t at = first + i * kRowLanes;
        const double value = at < width ? to_double(row[at * stride]) : 0.0;
        sums[i] += value * value;
      }
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

// out: [matrices, batch]; a block takes kRowsAtOnce rows of one matrix.
template <typename T>
PC_KERNEL void row_sq_norms_kernel(Matrices<T> matrices, double* out, int64_t batch) {
  const int64_t blocks_each = (batch + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t matrix = block() / blocks_each;
  const int64_t b = block() % blocks_each * kRowsAtOnce + thread() / kRowLanes;
  if (b >= batch) return;
  const int lane = thread() % kRowLanes;
  const T* row = matrices.rows[matrix] + b * matrices.row_stride[matrix];
  double sum = sum_of_squares(row, matrices.width[matrix], matrices.column_stride[matrix], lane);
  for (int by = kRowLanes / 2; by > 0; by /= 2) sum += shuffle_xor(sum, by);
  if (lane == 0) out[matrix * batch + b] = sum;
}

// Runs the first `count` matrices.
template <typename T>
cudaError_t launch_row_sq_norms(const Matrices<T>& matrices, int count, double* out, int64_t batch,
                                cudaStream_t stream) {
  const int64_t blocks_each = (batch + kRowsAtOnce - 1) / kRowsAtOnce;
  return launch(row_sq_norms_kernel<T>, count * blocks_each, kRowThreads, 0, stream, matrices, out,
                batch);
}

}  // namespace pc
