// Reductions over gradients that are there as rows [B, P]: those of small parameters.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "panels.h"
#include "reduction.h"
#include "row_gram.h"

namespace pc {

// Columns that a task sums up, and numbers that are worth a thread of their own.
constexpr int64_t kColumns = 1024, kGrain = 65536;

// Sets to[i], i < size, to the sum of row(r).at<V>(i) over `count` rows from `first`; adds it if
// not `fresh`.
template <int64_t count, typename V, typename T, typename Row>
PC_INLINE void sum_rows_at(int64_t first, bool fresh, int64_t size, T* to, const Row& row) {
  [&]<std::size_t... k>(std::index_sequence<k...>) PC_INLINED {
    const std::array rows = {row(first + k)...};
    each_vector<V>(0, size, [&]<typename W>(int64_t i) PC_INLINED {
      W sums[count] = {rows[k].template at<W>(i)...};
#pragma GCC unroll 4
      for (int64_t half = count / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      store<W>(to + i, fresh ? sums[0] : load<W>(to + i) + sums[0]);
    });
  }(std::make_index_sequence<count>());
}

// to[i] = the sum of row(r).at<V>(i) over all rows, i < size <= kColumns. Blocks of rows are added
// up on their own, and several rows at a time, so that sums are rarely read and written.
template <typename Machine, int64_t several, typename T, typename Row>
PC_INLINE void sum_columns(int64_t rows, int64_t size, T* to, const Row& row) {
  using V = Vector<Machine, T>;
  alignas(64) T block[kColumns];
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = std::min(first + kBlock, rows);
    T* const sums = first == 0 ? to : block;
    int64_t r = first;
    for (; r + several <= last; r += several) {
      sum_rows_at<several, V>(r, r == first, size, sums, row);
    }
    for (; r < last; ++r) sum_rows_at<1, V>(r, r == first, size, sums, row);
    if (first == 0) continue;
    for (int64_t i = 0; i < size; ++i) to[i] += block[i];
  }
}

// A row of gradients, and what is made of them.
template <typename T, typename Of>
struct RowOf {
  const T* data;
  Of of;

  template <typename V>
  PC_INLINE V at(int64_t i) const {
    return of(load<V>(data + i));
  }
};

// Outputs that need every row on its own, or add rows up.
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
    for (T** output : {&to.weighted_sum, &to.second_moment, &to.sign_sum}) {
      if (*output) *output += first;
    }
    Buffer<T> own(to.sum_dots && !to.weighted_sum ? size : 0);
    if (!own.empty()) to.weighted_sum = own.data();
    reduce_columns(rows, size, to);
    const int64_t grain = kGrain / size + 1;
    torch::stable::parallel_for(0, batch_, grain, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        using Machine = decltype(machine);
        for (int64_t b = begin; b < end; ++b) {
          if (to.sq_norms) sq_norms_[b] += dot<Machine>(rows(b), rows(b), size);
          if (to.dots) dots_[b] += dot<Machine>(rows(b), to.direction + first, size);
          if (to.sum_dots)
            sum_dots_[b] += dot<Machine>(rows(b), static_cast<const T*>(to.weighted_sum), size);
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
    if (!to.weighted_sum && !to.second_moment && !to.sign_sum) return;
    const int64_t tasks = (size + kColumns - 1) / kColumns;
    const int64_t grain = kGrain / (batch_ * std::min(size, kColumns)) + 1;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task * kColumns;
          reduce_columns<decltype(machine)>(rows, first, std::min(kColumns, size - first), to);
        }
      });
    });
  }

  template <typename Machine>
  PC_INLINE void reduce_columns(const Rows<T>& rows, int64_t first, int64_t size,
                                const Reduction<T>& to) const {
    const auto sum = [&](T* output, const auto& of) PC_INLINED {
      if (output == nullptr) return;
      sum_columns<Machine, 4>(batch_, size, output + first, [&](int64_t b) PC_INLINED {
        return RowOf<T, decltype(of(b))>{rows(b) + first, of(b)};
      });
    };
    if (to.coef == nullptr) {
      sum(to.weighted_sum,
          [](int64_t) PC_INLINED { return [](auto value) PC_INLINED { return value; }; });
    } else {
      sum(to.weighted_sum, [&](int64_t b) PC_INLINED {
        return [coef = to.coef[b]](auto value)
                   PC_INLINED { return coef == 0 ? decltype(value){} : coef * value; };
      });
    }
    sum(to.second_moment,
        [](int64_t) PC_INLINED { return [](auto value) PC_INLINED { return value * value; }; });
    sum(to.sign_sum,
        [](int64_t) PC_INLINED { return [](auto value) PC_INLINED { return signs(value); }; });
  }

  int64_t batch_;
  const Reduction<T>& to_;
  Buffer<double> sq_norms_, dots_, sum_dots_;
};

}  // namespace pc
