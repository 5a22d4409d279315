// Order statistics as the tile engine and the ops share them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "panels.h"
#include "pc/order.h"

namespace pc {

// out[i] of columns i of rows, which are worth coef[row] if that is given. Defined in
// dense_order.cpp.
template <typename T>
void order_columns(const Rows<T>& rows, int64_t size, const T* coef, const Order& order, T* out);

// The same by all threads.
template <typename T>
void order_rows(const Rows<T>& rows, int64_t size, const T* coef, const Order& order, T* out);

// Turns sums over `batch` examples into what kSignAgreement makes of them, from sign_sum.
template <typename T>
void keep_agreed(int64_t batch, double threshold, const Buffer<T>& sign_sum, T* weighted_sum) {
  const T count = static_cast<T>(batch), least = static_cast<T>(threshold);
  torch::stable::parallel_for(0, sign_sum.size(), 1 << 14, [&](int64_t begin, int64_t end) {
    vectorized([&](auto) PC_INLINED {
      for (int64_t i = begin; i < end; ++i) {
        const T size = sign_sum[i] < 0 ? -sign_sum[i] : sign_sum[i];
        // A sum that is not finite times zero is NaN.
        weighted_sum[i] =
            (size / count >= least ? weighted_sum[i] / count : T{0}) + weighted_sum[i] * T{0};
      }
    });
  });
}

// The share of each example of a group in the mean of its group.
template <typename T>
Buffer<T> group_shares(int64_t groups, int64_t count) {
  Buffer<T> shares(groups);
  for (int64_t j = 0; j < groups; ++j) {
    shares[j] =
        T{1} / static_cast<T>(group_start(j + 1, groups, count) - group_start(j, groups, count));
  }
  return shares;
}

}  // namespace pc
