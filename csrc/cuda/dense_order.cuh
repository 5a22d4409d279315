// Kernel and launcher of dense_order: each thread takes some columns, neighbouring threads
// neighbouring ones, and reads an example's values from memory whenever a rule asks for them.
#pragma once

#include "order_select.cuh"

namespace pc {

template <typename T, int owned>
struct DenseSource {
  const T* rows;  // [batch, size], from the first column of the thread
  int64_t size;
  int examples;
  int64_t steps[owned];  // to the thread's columns, to the last one where there is none

  PC_DEVICE int batch() const { return examples; }
  PC_DEVICE void stage(int, int) {}
  PC_DEVICE bool again(bool wanted) const { return wanted; }

  PC_DEVICE Values<T, owned> at(int b) const {
    Values<T, owned> result;
    const T* row = rows + b * size;
    PC_UNROLL
    for (int i = 0; i < owned; ++i) result.of[i] = row[steps[i]];
    return result;
  }

  template <typename Use>
  PC_DEVICE void each(int first, int last, const Use& use) const {
    for (int b = first; b < last; ++b) use(b, at(b));
  }
};

// rows: [batch, size], out: [size]
template <typename Way, typename T>
PC_KERNEL void dense_order_kernel(const T* rows, T* out, int batch, int64_t size, Asked<T> asked) {
  constexpr int owned = Way::owned;
  const int64_t first = block() * threads() * owned + thread();
  const int64_t start = first < size ? first : size - 1;
  DenseSource<T, owned> source{rows + start, size, batch, {}};
  PC_UNROLL
  for (int i = 0; i < owned; ++i) {
    const int64_t step = static_cast<int64_t>(i) * threads();
    source.steps[i] = start + step < size ? step : size - 1 - start;
  }
  T result[owned];
  Way::run(source, asked, result);
  PC_UNROLL
  for (int i = 0; i < owned; ++i) {
    const int64_t column = first + static_cast<int64_t>(i) * threads();
    if (column < size) out[column] = result[i];
  }
}

// batch > 0
template <typename T>
cudaError_t launch_dense_order(const T* rows, T* out, int64_t batch, int64_t size,
                               const Order& order, cudaStream_t stream) {
  return with_way<T>(order, batch, [&]<typename Way>(Way, const Asked<T>& asked) {
    const int64_t wide = kOrderThreads * Way::owned;
    return launch(dense_order_kernel<Way, T>, (size + wide - 1) / wide, kOrderThreads, 0, stream,
                  rows, out, static_cast<int>(batch), size, asked);
  });
}

}  // namespace pc
