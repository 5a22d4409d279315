// Order statistics on CUDA: what a thread makes of the values that its coordinates have in the
// examples of a batch. A source gives the values: `batch()`, `each(first, last, use)` for
// use(b, values) in order, and, in between `stage(first, last)`, `at(b)`. All threads of a block
// call it alike, for it may wait for them; `again` says whether it does, or the thread wants to.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "pc/device.cuh"
#include "pc/order.h"
#include "pc/select.h"

namespace pc {

constexpr int kOrderThreads = 128;

// An `Order` as kernels take it.
template <typename T>
struct Asked {
  Rule rule;
  int k;
  T share;
  bool drop;

  // How many finite values it takes.
  PC_DEVICE int least(int all) const {
    if (!drop) return all;
    switch (rule) {
      case Rule::kWinsorizedMean:
      case Rule::kTrimmedMean:
      case Rule::kPhocas:
        return 2 * k + 1;
      case Rule::kMeaMed:
        return k + 1;
      default:
        return 1;
    }
  }
};

// The values that an example has in the coordinates of a thread.
template <typename T, int size>
struct Values {
  T of[size];
};

// `each` of a source that holds some examples at a time.
template <typename Source, typename Use>
PC_DEVICE void each_held(Source& source, int held, int first, int last, const Use& use) {
  for (int start = first; start < last; start += held) {
    const int stop = start + held < last ? start + held : last;
    source.stage(start, stop);
    for (int b = start; b < stop; ++b) use(b, source.at(b));
  }
}

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// Without arithmetic: what is a product may be fused with a difference, which is then its rounding.
template <typename T>
PC_DEVICE bool is_finite(T value) {
  return fabs(value) < kInfinity<T>;
}

// use(i) for all i below `size`, unrolled before arrays get their place: theirs is in registers.
template <int size, typename Use>
PC_DEVICE void each_constant(const Use& use) {
  if constexpr (size > 0) {
    each_constant<size - 1>(use);
    use(size - 1);
  }
}

// A sum over examples in blocks, so that it does not drift.
template <typename T>
struct Sum {
  T total, block;

  PC_DEVICE void add(int b, T value) {
    block += value;
    if ((b & 63) == 63) {
      total += block;
      block = 0;
    }
  }
  PC_DEVICE T get() const { return total + block; }
};

// Mean of all but k values, those nearest the centre. In order they are a window, which moves up as
// long as the middle of its lowest value and of the one above it is below the centre.
template <typename T, typename Column>
PC_DEVICE T mean_near(const Column& column, T centre, int count, int k) {
  const int size = count - k;
  int start = 0, end = k;
  T low, high;
  for (int left = k; left > 0; left /= 2) {
    const int middle = (start + end) / 2;
    column.at(middle, middle + size, low, high);
    const bool moves = start < end && T(0.5) * low + T(0.5) * high < centre;
    start = moves ? middle + 1 : start;
    end = moves ? end : middle;
  }
  column.at(start, start + size - 1, low, high);
  return column.sum(start, start + size, low, high) / static_cast<T>(size);
}

// The result of the rule for `count` values that a column has in order: `at(i, j, low, high)` gives
// those of two ranks, `sum(first, last, low, high)` adds up ranks whose first and last value are
// known. There is one call for all rules, since each is a lot of code.
template <typename T, typename Column>
PC_DEVICE T of_sorted(const Column& column, int count, const Asked<T>& asked) {
  const int k = asked.k;
  const bool clips = asked.rule == Rule::kWinsorizedMean || asked.rule == Rule::kTrimmedMean;
  const bool inner = clips || asked.rule == Rule::kPhocas;
  const bool lower = asked.rule == Rule::kLowerMedian;
  const int first = inner ? k : (count - 1) / 2;
  const int last = inner ? count - 1 - k : lower ? first : count / 2;
  T low, high;
  column.at(first, last, low, high);
  if (lower) return low;
  T centre = T(0.5) * low + T(0.5) * high;
  if (inner) {
    const T sum = column.sum(first, last + 1, low, high);
    const T ends = static_cast<T>(k) * low + static_cast<T>(k) * high;
    centre = asked.rule == Rule::kWinsorizedMean ? (sum + ends) / static_cast<T>(count)
                                                 : sum / static_cast<T>(count - 2 * k);
  }
  const bool near = asked.rule == Rule::kPhocas || asked.rule == Rule::kMeaMed;
  return near ? mean_near(column, centre, count, k) : centre;
}

// values[rank], of registers: a tree of choices.
template <int size, typename T>
PC_DEVICE T pick(const T* values, int rank) {
  if constexpr (size == 1) {
    return *values;
  } else {
    const T low = pick<size / 2>(values, rank), high = pick<size / 2>(values + size / 2, rank);
    return rank & (size / 2) ? high : low;
  }
}

template <int size, typename T>
PC_DEVICE T sum_ranks(const T* values, int first, int last) {
  if constexpr (size == 1) {
    return first <= 0 && 0 < last ? *values : T(0);
  } else {
    return sum_ranks<size / 2>(values, first, last) +
           sum_ranks<size / 2>(values + size / 2, first - size / 2, last - size / 2);
  }
}

// A column whose values are sorted in registers, infinity behind them.
template <typename T, int size>
struct Sorted {
  T values[size];

  PC_DEVICE void at(int i, int j, T& low, T& high) const {
    low = pick<size>(values, i);
    high = i == j ? low : pick<size>(values, j);
  }
  PC_DEVICE T sum(int first, int last, T, T) const { return sum_ranks<size>(values, first, last); }
};

}  // namespace pc
