// What a *_reduce op makes of the gradients.
#pragma once

#include <cstdint>
#include <vector>

namespace pc {

// Null where not wanted; B examples, a parameter of P numbers.
template <typename T>
struct Reduction {
  const T* coef = nullptr;       // [B], of sum; null for ones
  const T* direction = nullptr;  // [P], of dots
  T* sq_norms = nullptr;         // [B]
  T* dots = nullptr;             // [B]
  T* sum = nullptr;              // [P]
  T* moment = nullptr;           // [P]
  T* sign = nullptr;             // [P]
};

// NaN for NaN.
template <typename T>
inline T sign_of(T value) {
  return value != value ? value : T(value > 0) - T(value < 0);
}

// Sums parts [B, n] of each example, in double and in order.
template <typename T>
void sum_parts(const std::vector<T>& parts, int64_t n, T* out, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += parts[b * n + i];
    out[b] = static_cast<T>(total);
  }
}

}  // namespace pc
