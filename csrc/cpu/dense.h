// Reductions over gradients that are there as rows [B, P]: those of small parameters.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "reduction.h"
#include "row_gram.h"

namespace pc {

// to[i] = the sum over rows of value(row, i), of columns first .. last. Blocks of rows are added up
// on their own.
template <typename T, typename Value>
PC_INLINE void sum_columns(int64_t batch, int64_t first, int64_t last, T* to, const Value& value) {
  constexpr int64_t width = 512;
  for (int64_t start = 0; start < batch; start += kBlock) {
    T block[width] = {};
    const int64_t end = std::min(start + kBlock, batch);
    for (int64_t b = start; b < end; ++b) {
      for (int64_t i = first; i < last; ++i) block[i - first] += value(b, i);
    }
    for (int64_t i = first; i < last; ++i) {
      to[i] = start == 0 ? block[i - first] : to[i] + block[i - first];
    }
  }
}

// What needs every row on its own, or adds them up.
template <typename T>
class Dense {
 public:
  Dense(int64_t batch, const Reduction<T>& to) : batch_(batch), to_(to) {
    if (to.sq_norms) sq_norms_.assign(batch, 0);
    if (to.dots) dots_.assign(batch, 0);
    if (to.sum_dots) sum_dots_.assign(batch, 0);
    if (to.gram) std::fill_n(to.gram, batch * batch, T{0});
  }

  // Columns of the parameter from `first`: reductions over examples are set, the others added to.
  void add(const Rows<T>& rows, int64_t first, int64_t size) {
    Reduction<T> to = to_;
    for (T** output : {&to.sum, &to.moment, &to.sign}) {
      if (*output) *output += first;
    }
    Buffer<T> own(to.sum_dots && !to.sum ? size : 0);
    if (!own.empty()) to.sum = own.data();
    reduce_columns(rows, size, to);
    torch::stable::parallel_for(0, batch_, 16, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        using Machine = decltype(machine);
        for (int64_t b = begin; b < end; ++b) {
          if (to.sq_norms) sq_norms_[b] += dot<Machine>(rows(b), rows(b), size);
          if (to.dots) dots_[b] += dot<Machine>(rows(b), to.direction + first, size);
          if (to.sum_dots)
            sum_dots_[b] += dot<Machine>(rows(b), static_cast<const T*>(to.sum), size);
        }
      });
    });
    if (to.gram) RowGram<T>(rows, rows, size, true).add_to(to.gram);
  }

  void finish() {
    if (to_.sq_norms) std::copy(sq_norms_.begin(), sq_norms_.end(), to_.sq_norms);
    if (to_.dots) std::copy(dots_.begin(), dots_.end(), to_.dots);
    if (to_.sum_dots) std::copy(sum_dots_.begin(), sum_dots_.end(), to_.sum_dots);
    if (to_.gram) mirror(to_.gram, batch_);
  }

 private:
  void reduce_columns(const Rows<T>& rows, int64_t size, const Reduction<T>& to) const {
    if (!to.sum && !to.moment && !to.sign) return;
    constexpr int64_t width = 512;
    torch::stable::parallel_for(0, (size + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
      vectorized([&](auto) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task * width, last = std::min(first + width, size);
          const auto row = [&](int64_t b, int64_t i) PC_INLINED { return rows(b)[i]; };
          const auto weighted = [&](int64_t b, int64_t i) PC_INLINED {
            return to.coef[b] == 0 ? T{0} : to.coef[b] * rows(b)[i];
          };
          const auto square = [&](int64_t b, int64_t i)
                                  PC_INLINED { return rows(b)[i] * rows(b)[i]; };
          const auto sign = [&](int64_t b, int64_t i) PC_INLINED { return sign_of(rows(b)[i]); };
          if (to.sum && to.coef) sum_columns(batch_, first, last, to.sum, weighted);
          if (to.sum && !to.coef) sum_columns(batch_, first, last, to.sum, row);
          if (to.moment) sum_columns(batch_, first, last, to.moment, square);
          if (to.sign) sum_columns(batch_, first, last, to.sign, sign);
        }
      });
    });
  }

  int64_t batch_;
  const Reduction<T>& to_;
  Buffer<double> sq_norms_, dots_, sum_dots_;
};

}  // namespace pc
