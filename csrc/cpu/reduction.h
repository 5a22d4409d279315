// The outputs of a *_reduce op.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pc {

struct Order;

// Null where not wanted; B examples, a parameter of P numbers.
template <typename T>
struct Reduction {
  const T* coef = nullptr;       // [B], of weighted_sum; null for ones
  const T* direction = nullptr;  // [P], of dots
  T* sq_norms = nullptr;         // [B]
  T* dots = nullptr;             // [B]
  T* weighted_sum = nullptr;     // [P]
  T* second_moment = nullptr;    // [P]
  T* sign_sum = nullptr;         // [P]
  T* sum_dots = nullptr;         // [B]
  T* gram = nullptr;             // [B, B]
  const Order* order = nullptr;  // of aggregate
  T* aggregate = nullptr;        // [P], of examples times coef

  // Whether all examples are needed at one place of the parameter.
  bool meet() const { return sum_dots || gram || aggregate; }
  bool any() const {
    return sq_norms || dots || weighted_sum || second_moment || sign_sum || meet();
  }
};

// NaN for NaN.
template <typename T>
__attribute__((always_inline)) inline T sign_of(T value) {
  return value != value ? value : T(value > 0) - T(value < 0);
}

// Sums of parts [n, size] over the first, in double and in order.
template <typename T, typename Parts>
void sum_parts(const Parts& parts, int64_t n, T* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (int64_t part = 0; part < n; ++part) total += parts[part * size + i];
    out[i] = static_cast<T>(total);
  }
}

// sum_c coef_c gram[b][c], leaving out those of no weight. NaN in an example's own gradient shows
// all the same, and so does Inf if none has a weight: it is multiplied by zeros.
template <typename T>
void weigh_rows(const T* gram, int64_t n, const T* coef, T* out) {
  for (int64_t b = 0; b < n; ++b) {
    double total = 0;
    bool weighed = false;
    for (int64_t c = 0; c < n; ++c) {
      const double weight = coef == nullptr ? 1 : coef[c];
      weighed |= weight != 0;
      if (weight != 0) total += weight * gram[b * n + c];
    }
    const double own = gram[b * n + b];
    if (own != own || !weighed) total += own * 0;
    out[b] = static_cast<T>(total);
  }
}

// Rows of a triangle in an order in which every run of them is about as long as the others: the
// first, the last, the second, ...
inline int64_t fold(int64_t row, int64_t n) { return row % 2 == 0 ? row / 2 : n - 1 - row / 2; }

// The lower triangle of [n, n] from the upper one, in blocks of rows whose lines the cache holds
// together.
template <typename T>
void mirror(T* gram, int64_t n) {
  constexpr int64_t block = 32;
  for (int64_t row = 0; row < n; row += block) {
    for (int64_t column = 0; column <= row; column += block) {
      for (int64_t i = row; i < std::min(row + block, n); ++i) {
        T* to = gram + i * n;
        const int64_t end = std::min(column + block, i);
        for (int64_t j = column; j < end; ++j) to[j] = gram[j * n + i];
      }
    }
  }
}

}  // namespace pc
