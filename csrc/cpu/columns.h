// Order statistics of the values of one coordinate, over examples: for vectors of coordinates at a
// time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "order.h"
#include "pc/select.h"
#include "pc/vector.h"
#include "sorted.h"

namespace pc {

// Reduces columns of values by a rule. Has memory for one vector of columns.
template <typename Machine, typename T>
class Columns {
 public:
  using V = Vector<Machine, T>;

  PC_INLINE Columns(int64_t count, const Order& order) : count_(count), order_(order) {
    values_.resize(sort_size<Machine>(count) * kLanesOf<V>);
    if (order.drop) column_.resize(count);
  }

  // The aggregate of value(b) over all b, a vector of example b's values of some coordinates.
  template <typename Value>
  PC_INLINE V operator()(const Value& value) {
    const V result = whole(value);
    return order_.drop ? dropping(result, value) : result;
  }

 private:
  template <typename Value>
  PC_INLINE V whole(const Value& value) {
    if (order_.rule == Rule::kSignAgreement) return agreement(value);
    const int64_t k = order_.count();
    if (order_.clips() && 2 * k + 2 <= count_) {
      switch (k) {
        case 0:
          return clipped<1>(value);
        case 1:
          return clipped<2>(value);
        case 2:
          return clipped<3>(value);
        case 3:
          return clipped<4>(value);
        case 4:
          return clipped<5>(value);
        case 5:
          return clipped<6>(value);
      }
    }
    return order_.rule == Rule::kMedianOfMeans ? means(value) : sorted(count_, value);
  }

  template <typename Value>
  PC_INLINE V sorted(int64_t count, const Value& value) {
    const int64_t size = sort_size<Machine>(count);
    V *values = reinterpret_cast<V*>(values_.data()), bad = {};
    for (int64_t b = 0; b < count; ++b) {
      values[b] = value(b);
      bad += poison(values[b]);
    }
    std::fill(values + count, values + size, V{} + std::numeric_limits<T>::infinity());
    sort_columns<Machine>(values, size);
    return of_sorted(values, count, order_) + bad;
  }

  // Winsorized or trimmed means whose `size` values at either end, one more than are clipped, fit
  // into registers.
  template <int size, typename Value>
  PC_INLINE V clipped(const Value& value) {
    Extremes<size, V> extremes;
    V bad = {}, middle = {};
    const auto next = [&](int64_t b) PC_INLINED {
      const V one = value(b);
      bad += poison(one);
      return one;
    };
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) {
      extremes.top[i] = V{} - std::numeric_limits<T>::infinity();
      extremes.bottom[i] = V{} + std::numeric_limits<T>::infinity();
    }
    for (int64_t b = 0; b < size; ++b) extremes.into_top(next(b));
    for (int64_t b = size; b < 2 * size; ++b) extremes.pass(next(b));
    for (int64_t start = 2 * size; start < count_; start += kBlock) {
      V block = {};
      for (int64_t b = start; b < std::min(start + kBlock, count_); ++b) {
        block += extremes.pass(next(b));
      }
      middle += block;
    }
    const T share = order_.rule == Rule::kWinsorizedMean ? size : 1;
    const T all = order_.rule == Rule::kWinsorizedMean ? count_ : count_ - 2 * (size - 1);
    const V ends = extremes.top[size - 1] * share + extremes.bottom[size - 1] * share;
    return (middle + ends) / all + bad;
  }

  template <typename Value>
  PC_INLINE V agreement(const Value& value) {
    const V zero = {}, one = zero + 1;
    V bad = {};
    const V sum = sum_of<V>(0, count_, [&](int64_t b) PC_INLINED {
      const V v = value(b);
      bad += poison(v);
      return v;
    });
    const V signs = sum_of<V>(0, count_, [&](int64_t b) PC_INLINED {
      const V v = value(b);
      return (v > 0 ? one : zero) - (v < 0 ? one : zero);
    });
    return agreed(sum, signs, count_) + bad;
  }

  template <typename S>
  PC_INLINE S agreed(S sum, S signs, int64_t count) const {
    const S zero = {}, share = signs / static_cast<T>(count);
    const S size = share < 0 ? -share : share;
    return size >= static_cast<T>(order_.k) ? sum / static_cast<T>(count) : zero;
  }

  int64_t start_of(int64_t j) const { return group_start(j, order_.count(), count_); }

  template <typename Value>
  PC_INLINE V means(const Value& value) {
    return sorted(order_.count(), [&](int64_t j) PC_INLINED {
      const int64_t first = start_of(j), last = start_of(j + 1);
      return sum_of<V>(first, last, value) / static_cast<T>(last - first);
    });
  }

  // Lane by lane, since each may leave out others; most leave out none.
  template <typename Value>
  PC_INLINE V dropping(V result, const Value& value) {
    T *values = values_.data(), results[kLanesOf<V>];
    Buffer<T>& column = column_;
    store<V>(results, result);
    if (std::all_of(results, results + kLanesOf<V>, [](T x) { return x == x; })) return result;
    for (int64_t b = 0; b < count_; ++b) store<V>(values + b * kLanesOf<V>, value(b));
    for (int64_t lane = 0; lane < kLanesOf<V>; ++lane) {
      if (results[lane] == results[lane]) continue;
      int64_t count = 0, group = 0, in_group = 0;
      T sum = 0;
      const auto end_group = [&] {
        if (in_group > 0) column[count++] = sum / static_cast<T>(in_group);
        sum = 0;
        in_group = 0;
      };
      const bool grouped = order_.rule == Rule::kMedianOfMeans;
      for (int64_t b = 0; b < count_; ++b) {
        if (grouped && b == start_of(group + 1)) {
          end_group();
          ++group;
        }
        const T one = values[b * kLanesOf<V> + lane];
        if (!std::isfinite(one)) continue;
        if (grouped) {
          sum += one;
          ++in_group;
        } else {
          column[count++] = one;
        }
      }
      if (grouped) end_group();
      results[lane] = of_column(count);
    }
    return load<V>(results);
  }

  T of_column(int64_t count) {
    T* values = column_.data();
    if (order_.rule != Rule::kSignAgreement) {
      std::sort(values, values + count);
      return of_sorted(static_cast<const T*>(values), count, order_);
    }
    if (count == 0) return std::numeric_limits<T>::quiet_NaN();
    const T sum = sum_of<T>(0, count, [&](int64_t i) PC_INLINED { return values[i]; });
    T signs = 0;
    for (int64_t i = 0; i < count; ++i) signs += T(values[i] > 0) - T(values[i] < 0);
    return agreed(sum, signs, count);
  }

  int64_t count_;
  Order order_;
  Buffer<T> values_, column_;
};

}  // namespace pc
