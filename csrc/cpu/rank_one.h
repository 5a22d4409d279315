// Linear layers with one position for each example: a gradient is g_b x_b^T, so that its norm is
// the product of theirs, and sums over examples are products of whole matrices.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "linear.h"
#include "plan.h"
#include "tile_engine.h"
#include "workspace.h"

namespace pc {

// Logarithm of the largest number of a row, rounded down; 0 if there is none, or no largest one.
template <typename T>
PC_INLINE int exponent(const T* row, int64_t size) {
  constexpr int64_t lanes = kLine<T>;
  T largest[lanes] = {};
  for (int64_t i = 0; i < size; i += lanes) {
    const int64_t count = std::min(lanes, size - i);
    for (int64_t j = 0; j < count; ++j) {
      const T value = row[i + j] < 0 ? -row[i + j] : row[i + j];
      largest[j] = value > largest[j] ? value : largest[j];
    }
  }
  const T most = *std::max_element(largest, largest + lanes);
  return most > 0 && std::isfinite(most) ? std::ilogb(most) : 0;
}

// Scales of the rows of x and g, powers of two and inverse to each other, that keep the squares of
// both in range wherever the squares of their products are.
template <typename T>
void balance(const Linear<T>& linear, T* x_scale, T* g_scale) {
  torch::stable::parallel_for(0, linear.rows, 16, [&](int64_t first, int64_t last) {
    vectorized([&](auto) PC_INLINED {
      for (int64_t row = first; row < last; ++row) {
        constexpr int most = sizeof(T) == sizeof(double) ? 1022 : 126;
        const int shift = std::clamp((exponent(linear.g + row * linear.out, linear.out) -
                                      exponent(linear.x + row * linear.in, linear.in)) /
                                         2,
                                     -most, most);
        x_scale[row] = std::ldexp(T{1}, shift);
        g_scale[row] = std::ldexp(T{1}, -shift);
      }
    });
  });
}

// The terms of a sum over rows: products of their entries, the squares of these, or the signs.
enum class Power { kFirst, kSecond, kSign };

// Rows [rows, width] as Power says and times scale[row], which may be null.
template <typename T>
Buffer<T> transform(const T* from, int64_t rows, int64_t width, Power power, const T* scale) {
  Buffer<T> result(rows * width);
  torch::stable::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    vectorized([&](auto) PC_INLINED {
      for (int64_t row = first; row < last; ++row) {
        const T* in = from + row * width;
        T* out = result.data() + row * width;
        const T factor = scale == nullptr ? T{1} : scale[row];
        if (power == Power::kSign) {
          for (int64_t i = 0; i < width; ++i) out[i] = sign_of(in[i]);
        } else if (power == Power::kSecond) {
          for (int64_t i = 0; i < width; ++i) out[i] = factor * in[i] * (factor * in[i]);
        } else {
          for (int64_t i = 0; i < width; ++i) out[i] = factor == 0 ? T{0} : factor * in[i];
        }
      }
    });
  });
  return result;
}

// The sum over rows of g x^T, past the boundaries of examples.
template <typename T>
void multiply_rows(const Linear<T>& linear, T* sum) {
  Linear<T> all = linear;
  all.length = kBlock;
  all.segments = (linear.rows + kBlock - 1) / kBlock;
  Reduction<T> to;
  to.weighted_sum = sum;
  run_engine(all, to);
}

// The same of squares, or of signs, which products of whole numbers do not change.
template <typename T>
void multiply_powers(const Linear<T>& linear, Power power, T* sum) {
  Buffer<T> x_scale, g_scale;
  if (power == Power::kSecond) {
    x_scale.resize(linear.rows);
    g_scale.resize(linear.rows);
    balance(linear, x_scale.data(), g_scale.data());
  }
  const auto scale = [](const Buffer<T>& from) { return from.empty() ? nullptr : from.data(); };
  const Buffer<T> x = transform(linear.x, linear.rows, linear.in, power, scale(x_scale));
  const Buffer<T> g = transform(linear.g, linear.rows, linear.out, power, scale(g_scale));
  multiply_rows(Linear<T>(x.data(), g.data(), linear.in, linear.out, linear.rows, 1), sum);
}

template <typename T>
bool finite(const T* values, int64_t size) {
  bool result = true;
  for (int64_t i = 0; i < size; ++i) result &= std::isfinite(values[i]);
  return result;
}

// sum_b coef_b G_b; examples of no weight are left out, whatever they hold.
template <typename T>
void sum_rows(const Linear<T>& linear, const T* coef, T* sum) {
  if (coef == nullptr) return multiply_rows(linear, sum);
  Buffer<T> scale(linear.rows), x;
  for (int64_t row = 0; row < linear.rows; ++row) scale[row] = coef[row / linear.length];
  const Buffer<T> g = transform(linear.g, linear.rows, linear.out, Power::kFirst, scale.data());
  for (int64_t row = 0; row < linear.rows; ++row) {
    if (scale[row] != 0 || finite(linear.x + row * linear.in, linear.in)) continue;
    if (x.empty()) x.assign(linear.x, linear.x + linear.rows * linear.in);
    std::fill_n(x.data() + row * linear.in, linear.in, T{0});
  }
  multiply_rows(
      Linear<T>(x.empty() ? linear.x : x.data(), g.data(), linear.in, linear.out, linear.rows, 1),
      sum);
}

// ||scale row||^2, by a scale of 2^-shift.
PC_INLINE double scaled_sq_norm(const double* row, int64_t size, int shift) {
  const double scale = std::ldexp(1.0, -shift);
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += scale * row[i] * (scale * row[i]);
  return sum;
}

// ||x||^2 ||g||^2, which may be in range where a factor is not.
template <typename Machine, typename T>
PC_INLINE double product_of_sq_norms(const T* x, int64_t in, const T* g, int64_t out) {
  const double x_norm = dot<Machine>(x, x, in), g_norm = dot<Machine>(g, g, out);
  const auto safe = [](double norm) PC_INLINED { return norm > 1e-30 && norm < 1e30; };
  if (safe(x_norm) && safe(g_norm)) return x_norm * g_norm;
  if constexpr (sizeof(T) < sizeof(double)) {
    return exact_dot(x, x, in) * exact_dot(g, g, out);
  } else {
    const int x_size = std::max(exponent(x, in), -1022), g_size = std::max(exponent(g, out), -1022);
    return std::ldexp(scaled_sq_norm(x, in, x_size) * scaled_sq_norm(g, out, g_size),
                      2 * (x_size + g_size));
  }
}

template <typename T>
void rank_one_sq_norms(const Linear<T>& linear, T* sq_norms) {
  torch::stable::parallel_for(0, linear.rows, 16, [&](int64_t first, int64_t last) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t b = first; b < last; ++b) {
        sq_norms[b] = static_cast<T>(product_of_sq_norms<decltype(machine)>(
            linear.x + b * linear.in, linear.in, linear.g + b * linear.out, linear.out));
      }
    });
  });
}

// <G_b, direction> = sum_t <g_bt, direction x_bt>, without any G.
template <typename T>
void dots_by_rows(const Linear<T>& linear, const T* direction, T* dots) {
  constexpr int64_t block = 64, columns = 4096 / sizeof(T);
  const int64_t blocks = (linear.rows + block - 1) / block;
  Buffer<double> sums(linear.rows, 0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * block, count = std::min(block, linear.rows - first);
        for (int64_t at = 0; at < linear.in; at += columns) {
          const int64_t size = std::min(columns, linear.in - at);
          for (int64_t o = 0; o < linear.out; o += block) {
            const Rows<T> x{linear.x + first * linear.in + at, count, linear.in};
            const Rows<T> rows{direction + o * linear.in + at, std::min(block, linear.out - o),
                               linear.in};
            const T* g = linear.g + first * linear.out + o;
            dot_rows<decltype(machine), T>(
                x, rows, size, [&](int64_t i, int64_t j, T value) PC_INLINED {
                  sums[first + i] += static_cast<double>(g[i * linear.out + j]) * value;
                });
          }
        }
      }
    });
  });
  for (int64_t b = 0; b < linear.segments; ++b) {
    double sum = 0;
    for (int64_t t = 0; t < linear.length; ++t) sum += sums[b * linear.length + t];
    dots[b] = static_cast<T>(sum);
  }
}

// With one position an example's gradient is g_b x_b^T: its norm is the product of theirs, and sums
// over examples of what is a product of their entries are products of matrices.
template <typename T>
void reduce_rank_one(const Linear<T>& linear, const Reduction<T>& to) {
  if (to.sq_norms) rank_one_sq_norms(linear, to.sq_norms);
  if (to.weighted_sum) sum_rows(linear, to.coef, to.weighted_sum);
  if (to.second_moment) multiply_powers(linear, Power::kSecond, to.second_moment);
  if (to.dots) dots_by_rows(linear, to.direction, to.dots);
  const bool exact = to.sign_sum && finite(linear.x, linear.rows * linear.in) &&
                     finite(linear.g, linear.rows * linear.out);
  if (to.sign_sum && exact) multiply_powers(linear, Power::kSign, to.sign_sum);
  if (to.sign_sum && !exact) {
    Reduction<T> signs;
    signs.sign_sum = to.sign_sum;
    run_engine(linear, signs);
  }
  if (rank_one_gram_is_cheap(linear.rows, linear.in, linear.out, to)) {
    ghost_reduce(linear.factors(), 1, to);
  } else if (to.sum_dots) {
    Buffer<T> own(to.weighted_sum ? 0 : linear.in * linear.out);
    if (!to.weighted_sum) sum_rows(linear, to.coef, own.data());
    dots_by_rows(linear, to.weighted_sum ? to.weighted_sum : own.data(), to.sum_dots);
  }
}

}  // namespace pc
