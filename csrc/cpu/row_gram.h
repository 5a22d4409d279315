// Dot products of gradients that are there as rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "reduction.h"
#include "workspace.h"

namespace pc {

// Columns of rows [count, size], in panels [count / panel, size, panel] that are padded with zeros.
template <int64_t panel, typename T>
Buffer<T> transposed_panels(const Rows<T>& rows, int64_t size) {
  Buffer<T> result(round_up(rows.count, panel) * size);
  for (int64_t first = 0; first < rows.count; first += panel) {
    T* const to = result.data() + first * size;
    for (int64_t r = 0; r < panel; ++r) {
      const bool padding = first + r >= rows.count;
      for (int64_t i = 0; i < size; ++i) to[i * panel + r] = padding ? T{0} : rows(first + r)[i];
    }
  }
  return result;
}

// Adds <a_i, b_j> to gram [a.count, b.count]; if b is a only where j >= i, and below in its panels.
// Rows of few numbers: sums of outer products of columns need no sums of the lanes of vectors.
template <typename T>
void add_outer_products(const Rows<T>& a, const Rows<T>& b, int64_t size, bool same, T* gram) {
  const Buffer<T> left = transposed_panels<kPanel>(a, size);
  const Buffer<T> right = transposed_panels<kLanes<T>>(b, size);
  const int64_t tasks = (a.count + kPanel - 1) / kPanel;
  const int64_t grain = 100000 / (b.count * (size + 8)) + 1;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = (same ? fold(task, tasks) : task) * kPanel;
        const int64_t high = std::min(kPanel, a.count - i);
        for (int64_t j = same ? i / kLanes<T> * kLanes<T> : 0; j < b.count; j += kLanes<T>) {
          const T *x = right.data() + j * size, *g = left.data() + i * size;
          const int64_t wide = std::min(kLanes<T>, b.count - j);
          T* const to = gram + i * b.count + j;
          if (high == kPanel && wide == kLanes<T>) {
            multiply_panels<decltype(machine)>(
                x, g, size, false, [&](int64_t r) PC_INLINED { return to + r * b.count; });
            continue;
          }
          alignas(64) T values[kPanel * kLanes<T>];
          multiply_panels<decltype(machine)>(
              x, g, size, true, [&](int64_t r) PC_INLINED { return values + r * kLanes<T>; });
          for (int64_t r = 0; r < high; ++r) {
            for (int64_t c = 0; c < wide; ++c) to[r * b.count + c] += values[r * kLanes<T> + c];
          }
        }
      }
    });
  });
}

// The same of rows of any length. A task has a block of the Gram and a range of the columns, with
// few blocks one of several.
template <typename T>
class RowGram {
 public:
  RowGram(const Rows<T>& a, const Rows<T>& b, int64_t size, bool same)
      : a_(a), b_(b), size_(size), same_(same), high_(blocks(a.count)), wide_(blocks(b.count)) {
    constexpr int64_t enough = 32;
    const int64_t room = workspace() / 2 / int64_t{sizeof(T)} / (a.count * b.count);
    ranges_ = std::min({enough / (high_ * wide_), size / (4 * kColumns), room});
    ranges_ = std::max<int64_t>(ranges_, 1);
  }

  void add_to(T* gram) const {
    constexpr int64_t few = 64;
    if (size_ <= few) return add_outer_products(a_, b_, size_, same_, gram);
    const int64_t numbers = a_.count * b_.count;
    Buffer<T> parts(ranges_ > 1 ? ranges_ * numbers : 0, T{0});
    T* to = ranges_ > 1 ? parts.data() : gram;
    torch::stable::parallel_for(0, high_ * wide_ * ranges_, 1, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t range = task % ranges_, j = task / ranges_ % wide_;
          const int64_t row = task / ranges_ / wide_, i = same_ ? fold(row, high_) : row;
          if (same_ && j < i) continue;
          add_block<decltype(machine)>(i * kBlockRows, j * kBlockRows, range * size_ / ranges_,
                                       (range + 1) * size_ / ranges_, to + range * numbers);
        }
      });
    });
    if (ranges_ == 1) return;
    for (int64_t i = 0; i < numbers; ++i) {
      double sum = gram[i];
      for (int64_t range = 0; range < ranges_; ++range) sum += parts[range * numbers + i];
      gram[i] = static_cast<T>(sum);
    }
  }

 private:
  // Rows of a block of the Gram, and columns at a time: both fit the L2 cache.
  static constexpr int64_t kBlockRows = 64, kColumns = 4096 / sizeof(T);

  static int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

  // On the diagonal only some rows at a time with those that follow them. Columns are added up in
  // double, so that rounding does not grow with their number.
  template <typename Machine>
  PC_INLINE void add_block(int64_t i, int64_t j, int64_t first, int64_t last, T* gram) const {
    const bool diagonal = same_ && i == j;
    const int64_t high = std::min(kBlockRows, a_.count - i);
    const int64_t wide = std::min(kBlockRows, b_.count - j), step = diagonal ? 8 : kBlockRows;
    double sums[kBlockRows * kBlockRows];
    std::fill_n(sums, high * kBlockRows, 0.0);
    for (int64_t at = first; at < last; at += kColumns) {
      for (int64_t r = 0; r < high; r += step) {
        const int64_t c = diagonal ? r : 0;
        const Rows<T> left{a_(i + r) + at, std::min(step, high - r), a_.stride};
        const Rows<T> right{b_(j + c) + at, wide - c, b_.stride};
        double* to = sums + r * kBlockRows + c;
        dot_rows<Machine, T>(left, right, std::min(kColumns, last - at),
                             [&](int64_t k, int64_t l, T value)
                                 PC_INLINED { to[k * kBlockRows + l] += value; });
      }
    }
    for (int64_t r = 0; r < high; ++r) {
      T* to = gram + (i + r) * b_.count + j;
      for (int64_t c = 0; c < wide; ++c) to[c] += static_cast<T>(sums[r * kBlockRows + c]);
    }
  }

  Rows<T> a_, b_;
  int64_t size_;
  bool same_;
  int64_t high_, wide_, ranges_;
};

}  // namespace pc
