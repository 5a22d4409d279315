// Sorting values of many coordinates side by side, and what rules make of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "order.h"
#include "pc/select.h"
#include "pc/vector.h"

namespace pc {

// Numbers, or vectors of them, with one interface.
template <typename V>
struct Lanes {
  using Number = NumberOf<V>;
  static constexpr int64_t count = kLanesOf<V>;
};
template <>
struct Lanes<float> {
  using Number = float;
};
template <>
struct Lanes<double> {
  using Number = double;
};

// Zero, or NaN where the value is not finite.
template <typename V>
PC_INLINE V poison(V value) {
  return value * typename Lanes<V>::Number{0};
}

// sum_i value(i) over first .. last, in blocks.
template <typename V, typename Value>
PC_INLINE V sum_of(int64_t first, int64_t last, const Value& value) {
  V sum = {};
  for (int64_t start = first; start < last; start += kBlock) {
    V block = {};
    for (int64_t i = start; i < std::min(start + kBlock, last); ++i) block += value(i);
    sum += block;
  }
  return sum;
}

// sum_i value(i) over all of them, values that are sorted. Each is added to the one as far from the
// other end: one after the other, the sum would go down and up again by more than it ends with.
template <typename V, typename Value>
PC_INLINE V sum_of_sorted(int64_t count, const Value& value) {
  const auto pair = [&](int64_t i) PC_INLINED { return value(i) + value(count - 1 - i); };
  V sum = sum_of<V>(0, count / 2, pair);
  if (count % 2) sum += value(count / 2);
  return sum;
}

template <typename V>
PC_INLINE V median_of(const V* sorted, int64_t count) {
  using T = typename Lanes<V>::Number;
  if (count % 2) return sorted[count / 2];
  return sorted[count / 2 - 1] * T(0.5) + sorted[count / 2] * T(0.5);
}

template <typename V>
PC_INLINE V trimmed_mean_of(const V* sorted, int64_t count, int64_t k) {
  using T = typename Lanes<V>::Number;
  const auto value = [&](int64_t i) PC_INLINED { return sorted[k + i]; };
  return sum_of_sorted<V>(count - 2 * k, value) / static_cast<T>(count - 2 * k);
}

// The mean of the count - k values nearest the centre. They follow each other; the window moves up
// as long as what enters is nearer than what leaves: as long as their middle is below the centre,
// which the middle of two values that have it for their own is not, whatever was rounded.
template <typename V>
PC_INLINE V mean_near(V centre, const V* sorted, int64_t count, int64_t k) {
  using T = typename Lanes<V>::Number;
  const int64_t size = count - k;
  const V zero = {};
  const auto leaves = [&](int64_t i) PC_INLINED {
    return sorted[i] * T(0.5) + sorted[i + size] * T(0.5) < centre;
  };
  const auto value = [&](int64_t i) PC_INLINED {
    V result = sorted[i];
    if (i >= size) result = leaves(i - size) ? result : zero;
    if (i < k) result = leaves(i) ? zero : result;
    return result;
  };
  return sum_of_sorted<V>(count, value) / static_cast<T>(size);
}

// The result of the rule for sorted values; NaN if they are too few for it.
template <typename V>
PC_INLINE V of_sorted(const V* sorted, int64_t count, const Order& order) {
  using T = typename Lanes<V>::Number;
  const int64_t k = order.count();
  const V none = V{} + std::numeric_limits<T>::quiet_NaN();
  if (count == 0) return none;
  switch (order.rule) {
    case Rule::kWinsorizedMean: {
      if (2 * k >= count) return none;
      const auto value = [&](int64_t i) PC_INLINED { return sorted[k + i]; };
      V sum = sum_of_sorted<V>(count - 2 * k, value);
      if (k) sum += (sorted[k] + sorted[count - 1 - k]) * static_cast<T>(k);
      return sum / static_cast<T>(count);
    }
    case Rule::kTrimmedMean:
      return 2 * k >= count ? none : trimmed_mean_of(sorted, count, k);
    case Rule::kPhocas:
      if (2 * k >= count) return none;
      return mean_near(trimmed_mean_of(sorted, count, k), sorted, count, k);
    case Rule::kMeaMed:
      return k >= count ? none : mean_near(median_of(sorted, count), sorted, count, k);
    case Rule::kLowerMedian:
      return sorted[(count - 1) / 2];
    default:
      return median_of(sorted, count);
  }
}

// Values to sort at a time that the registers hold.
template <typename Machine>
constexpr int kSorted = Machine::bytes == 64 ? 16 : 8;

// The power of two that a sort of `count` values takes.
template <typename Machine>
PC_INLINE int64_t sort_size(int64_t count) {
  int64_t size = kSorted<Machine>;
  while (size < count) size *= 2;
  return size;
}

// Sorts values, a power of two of them, lane by lane: pieces in registers, then by merging.
template <typename Machine, typename V>
PC_INLINE void sort_columns(V* values, int64_t size) {
  constexpr int64_t piece = kSorted<Machine>;
  const auto each_piece = [&](int64_t first, int64_t last, const auto& sort) PC_INLINED {
    for (int64_t at = first; at < last; at += piece) {
      V some[piece];
#pragma GCC unroll 16
      for (int64_t i = 0; i < piece; ++i) some[i] = values[at + i];
      sort(some);
#pragma GCC unroll 16
      for (int64_t i = 0; i < piece; ++i) values[at + i] = some[i];
    }
  };
  each_piece(0, size, [](V* some) PC_INLINED { sort_all<piece>(some); });
  for (int64_t length = piece; length < size; length *= 2) {
    for (int64_t start = 0; start < size; start += 2 * length) {
      V *low = values + start, *high = low + 2 * length - 1;
      for (int64_t i = 0; i < length; ++i) sort_two(low[i], high[-i]);
    }
    for (int64_t distance = length / 2; distance >= piece; distance /= 2) {
      for (int64_t start = 0; start < size; start += 2 * distance) {
        V *low = values + start, *high = low + distance;
        for (int64_t i = 0; i < distance; ++i) sort_two(low[i], high[i]);
      }
    }
    each_piece(0, size, [](V* some) PC_INLINED { sort_bitonic<piece>(some); });
  }
}

}  // namespace pc
