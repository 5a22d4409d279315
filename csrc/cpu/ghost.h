// Products of two Grams: <G_b, G_c> = sum_t sum_s <g_bt, g_cs> <x_bt, x_cs>, without any G. Cheaper
// than the tile engine where positions are few.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "panels.h"
#include "reduction.h"

namespace pc {

// Both factors of some rows, which are the positions of one or several examples.
template <typename T>
struct Factors {
  Rows<T> x, g;
  int64_t in, out;

  PC_INLINE Factors part(int64_t first, int64_t count) const {
    return {{x(first), count, x.stride}, {g(first), count, g.stride}, in, out};
  }
};

// A sum, and whether it is to be trusted: its terms have neither cancelled to little more than what
// rounding left of them nor left the range of T.
template <typename T>
struct Sum {
  PC_INLINE void add(double term, double weight = 1) {
    value += weight * term;
    magnitude += weight * std::abs(term);
  }

  PC_INLINE bool good() const {
    const bool finite = std::abs(value) <= std::numeric_limits<double>::max();
    return sizeof(T) == sizeof(double) || (finite && std::abs(value) >= magnitude / 1024);
  }

  double value = 0, magnitude = 0;
};

// sum_ij <x_i, x_j> <g_i, g_j> for all rows of a and b, in double and in no hurry.
template <typename T>
PC_INLINE double exact_product(const Factors<T>& a, const Factors<T>& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.x.count; ++i) {
    for (int64_t j = 0; j < b.x.count; ++j) {
      sum += exact_dot(a.x(i), b.x(j), a.in) * exact_dot(a.g(i), b.g(j), a.out);
    }
  }
  return sum;
}

template <typename T>
bool all_finite(const Factors<T>& factors) {
  bool result = true;
  for (int64_t i = 0; i < factors.x.count; ++i) {
    for (int64_t j = 0; j < factors.in; ++j) result &= std::isfinite(factors.x(i)[j]);
    for (int64_t j = 0; j < factors.out; ++j) result &= std::isfinite(factors.g(i)[j]);
  }
  return result;
}

// The sum, taken again if it is not to be trusted. Factors that are not finite leave nothing to
// gain, and a batch with one of them, as a loss scale that is too large makes them, is to take no
// longer than others.
template <typename T>
double settled(const Sum<T>& sum, const Factors<T>& a, const Factors<T>& b) {
  if (sum.good()) return sum.value;
  if (!std::isfinite(sum.value) && !(all_finite(a) && all_finite(b))) return sum.value;
  return exact_product(a, b);
}

// use(i, j, <x_i, x_j> <g_i, g_j>) for all rows of a and b.
template <typename Machine, typename T, typename Use>
PC_INLINE void multiply_grams(const Factors<T>& a, const Factors<T>& b, const Use& use) {
  constexpr int64_t block = 64, columns = 4096 / sizeof(T);
  T products[2][block * block];
  const auto add = [&](const Rows<T>& left, const Rows<T>& right, int64_t size, T* to) PC_INLINED {
    std::fill_n(to, left.count * block, T{0});
    for (int64_t at = 0; at < size; at += columns) {
      const Rows<T> l{left.data + at, left.count, left.stride};
      const Rows<T> r{right.data + at, right.count, right.stride};
      dot_rows<Machine, T>(l, r, std::min(columns, size - at),
                           [&](int64_t i, int64_t j, T value)
                               PC_INLINED { to[i * block + j] += value; });
    }
  };
  for (int64_t i = 0; i < a.x.count; i += block) {
    const Factors<T> left = a.part(i, std::min(block, a.x.count - i));
    for (int64_t j = 0; j < b.x.count; j += block) {
      const Factors<T> right = b.part(j, std::min(block, b.x.count - j));
      add(left.x, right.x, a.in, products[0]);
      add(left.g, right.g, a.out, products[1]);
      for (int64_t r = 0; r < left.x.count; ++r) {
        for (int64_t c = 0; c < right.x.count; ++c) {
          const double x = products[0][r * block + c], g = products[1][r * block + c];
          use(i + r, j + c, x * g);
        }
      }
    }
  }
}

// Adds <G_b, G_c> to gram [batch_a, batch_b]. The rows of a and b are examples of `length_a` and
// `length_b` positions; if b is a, only the upper triangle of blocks is computed.
template <typename T>
void ghost_gram(const Factors<T>& a, const Factors<T>& b, int64_t length_a, int64_t length_b,
                bool same, T* gram) {
  constexpr int64_t rows = 64;
  const int64_t batch_a = a.x.count / length_a, batch_b = b.x.count / length_b;
  const int64_t step_a = std::max<int64_t>(1, rows / length_a);
  const int64_t step_b = std::max<int64_t>(1, rows / length_b);
  const int64_t blocks_a = (batch_a + step_a - 1) / step_a;
  const int64_t blocks_b = (batch_b + step_b - 1) / step_b;
  torch::stable::parallel_for(0, blocks_a * blocks_b, 1, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / blocks_b;
        const int64_t i = (same ? fold(row, blocks_a) : row) * step_a;
        const int64_t j = task % blocks_b * step_b;
        if (same && j < i) continue;
        const int64_t rows_a = std::min(step_a, batch_a - i) * length_a;
        const int64_t rows_b = std::min(step_b, batch_b - j) * length_b;
        Sum<T> sums[rows * rows] = {};
        multiply_grams<decltype(machine), T>(
            a.part(i * length_a, rows_a), b.part(j * length_b, rows_b),
            [&](int64_t r, int64_t c, double value) PC_INLINED {
              // A division takes longer than the rest.
              const int64_t in_a = length_a == 1 ? r : r / length_a;
              const int64_t in_b = length_b == 1 ? c : c / length_b;
              sums[in_a * rows + in_b].add(value);
            });
        for (int64_t r = 0; r < rows_a / length_a; ++r) {
          for (int64_t c = 0; c < rows_b / length_b; ++c) {
            const double value = settled(sums[r * rows + c], a.part((i + r) * length_a, length_a),
                                         b.part((j + c) * length_b, length_b));
            gram[(i + r) * batch_b + j + c] += static_cast<T>(value);
          }
        }
      }
    });
  });
}

// The Gram of examples of `length` positions, and dots with their sum, as far as wanted.
template <typename T>
void ghost_reduce(const Factors<T>& factors, int64_t length, const Reduction<T>& to) {
  const int64_t batch = factors.x.count / length;
  Buffer<T> own(to.gram ? 0 : batch * batch);
  T* gram = to.gram ? to.gram : own.data();
  std::fill_n(gram, batch * batch, T{0});
  ghost_gram(factors, factors, length, length, true, gram);
  mirror(gram, batch);
  if (to.sum_dots) weigh_rows(gram, batch, to.coef, to.sum_dots);
}

// ||G||^2 of one example, all rows of `factors`.
template <typename Machine, typename T>
PC_INLINE double sq_norm_of(const Factors<T>& factors) {
  constexpr int64_t block = 64;
  Sum<T> sum;
  for (int64_t t = 0; t < factors.x.count; t += block) {
    const int64_t count = std::min(block, factors.x.count - t);
    const Factors<T> some = factors.part(t, count);
    multiply_grams<Machine, T>(some, some,
                               [&](int64_t, int64_t, double value) PC_INLINED { sum.add(value); });
    multiply_grams<Machine, T>(some, factors.part(t + count, factors.x.count - t - count),
                               [&](int64_t, int64_t, double value)
                                   PC_INLINED { sum.add(value, 2); });
  }
  const double value = settled(sum, factors, factors);
  // A sum that cancels wholly may be negative by rounding.
  return value < 0 ? 0 : value;
}

// ||G_b||^2 of examples of `length` positions.
template <typename T>
void ghost_sq_norms(const Factors<T>& factors, int64_t length, T* sq_norms) {
  torch::stable::parallel_for(0, factors.x.count / length, 1, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t b = begin; b < end; ++b) {
        const Factors<T> one = factors.part(b * length, length);
        sq_norms[b] = static_cast<T>(sq_norm_of<decltype(machine), T>(one));
      }
    });
  });
}

}  // namespace pc
