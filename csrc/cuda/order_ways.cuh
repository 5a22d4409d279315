// The ways in which a thread gets what a rule makes of its columns; each says how many it takes.
#pragma once

#include "order.cuh"

namespace pc {

// The mean, if enough signs agree.
struct Sums {
  static constexpr int owned = 4;

  template <typename T, typename Source>
  PC_DEVICE static void run(Source& source, const Asked<T>& asked, T (&result)[owned]) {
    Sum<T> sums[owned] = {};
    int counts[owned] = {}, signs[owned] = {};
    source.each(0, source.batch(), [&](int b, const auto& values) {
      PC_UNROLL
      for (int i = 0; i < owned; ++i) {
        const T value = values.of[i];
        const bool kept = is_finite(value);
        sums[i].add(b, kept ? value : T(0));
        counts[i] += kept;
        signs[i] += kept && value > 0;
        signs[i] -= kept && value < 0;
      }
    });
    PC_UNROLL
    for (int i = 0; i < owned; ++i) {
      const T count = static_cast<T>(counts[i]);
      const T agree = static_cast<T>(signs[i] < 0 ? -signs[i] : signs[i]) / count;
      result[i] = agree >= asked.share ? sums[i].get() / count : T(0);
      if (counts[i] < asked.least(source.batch())) result[i] = kNan<T>;
    }
  }
};

// Winsorized or trimmed means: the `size` values at either end in registers, more than k of them,
// or k for a trimmed mean. Without `drop`, there are at least 2 * `size` examples.
template <int size, bool drop>
struct Ends {
  static constexpr int owned = size <= 4 ? 4 : size <= 8 ? 2 : 1;

  template <typename T>
  struct Column {
    Extremes<size, T> ends;
    Sum<T> middle;
    T bad;
    int count;

    PC_DEVICE void clear() {
      middle = {0, 0};
      bad = 0;
      count = 0;
      each_constant<size>([&](int i) {
        ends.top[i] = -kInfinity<T>;
        ends.bottom[i] = kInfinity<T>;
      });
    }

    // A value that is left out goes through the largest as the smallest, then the other way round.
    PC_DEVICE void pass(int b, T value) {
      if constexpr (drop) {
        const bool kept = is_finite(value);
        count += kept;
        const T falls = ends.into_top(kept ? value : -kInfinity<T>);
        const T rests = ends.into_bottom(falls == -kInfinity<T> ? kInfinity<T> : falls);
        middle.add(b, rests == kInfinity<T> ? T(0) : rests);
      } else {
        bad += value * T(0);
        middle.add(b, ends.pass(value));
      }
    }

    // The mean of `all` values; the two ends meet if they are few.
    PC_DEVICE T get(int all, const Asked<T>& asked) const {
      const int k = asked.k;
      T sum = middle.get(), low = 0, high = 0;
      each_constant<size>([&](int i) {
        if (i >= k && i < all - k) sum += ends.top[i];
        if (i >= k && i < all - size) sum += ends.bottom[i];
        if (i == k) high = ends.top[i];
        if (i == k && i < all - size) low = ends.bottom[i];
        if (k >= all - size && i == all - 1 - k) low = ends.top[i];
      });
      if (asked.rule == Rule::kTrimmedMean) return sum / static_cast<T>(all - 2 * k);
      return (sum + (static_cast<T>(k) * low + static_cast<T>(k) * high)) / static_cast<T>(all);
    }
  };

  template <typename T, typename Source>
  PC_DEVICE static void run(Source& source, const Asked<T>& asked, T (&result)[owned]) {
    Column<T> columns[owned];
    each_constant<owned>([&](int i) { columns[i].clear(); });
    int start = 0;
    if constexpr (!drop) {
      source.each(0, size, [&](int, const auto& values) {
        each_constant<owned>([&](int i) {
          columns[i].bad += values.of[i] * T(0);
          columns[i].ends.into_top(values.of[i]);
        });
      });
      source.each(size, 2 * size, [&](int, const auto& values) {
        each_constant<owned>([&](int i) {
          columns[i].bad += values.of[i] * T(0);
          columns[i].ends.pass(values.of[i]);
        });
      });
      start = 2 * size;
    }
    source.each(start, source.batch(), [&](int b, const auto& values) {
      each_constant<owned>([&](int i) { columns[i].pass(b, values.of[i]); });
    });
    each_constant<owned>([&](int i) {
      const int all = drop ? columns[i].count : source.batch();
      result[i] = columns[i].get(all, asked) + columns[i].bad;
      if (all < asked.least(source.batch())) result[i] = kNan<T>;
    });
  }
};

// Any other rule of up to `size` values, sorted in registers.
template <int size>
struct Network {
  static constexpr int owned = 1;

  template <typename T, typename Source>
  PC_DEVICE static void run(Source& source, const Asked<T>& asked, T (&result)[owned]) {
    const int batch = source.batch();
    source.stage(0, batch);
    Sorted<T, size> column;
    int count = 0;
    PC_UNROLL
    for (int b = 0; b < size; ++b) {
      T value = kInfinity<T>;
      if (b < batch) value = source.at(b).of[0];
      const bool kept = is_finite(value);
      count += kept;
      column.values[b] = kept ? value : kInfinity<T>;
    }
    sort_all<size>(column.values);
    const T found = of_sorted(column, count, asked);
    result[0] = count < asked.least(batch) ? kNan<T> : found;
  }
};

// use(mean) of each group of examples; NaN for one that keeps nothing, Inf for one whose sum
// leaves the range of the dtype.
template <typename T, typename Source, typename Use>
PC_DEVICE void each_mean(Source& source, const Asked<T>& asked, const Use& use) {
  const int size = source.batch() / asked.k, larger = source.batch() % asked.k;
  int first = 0;
  for (int j = 0; j < asked.k; ++j) {
    const int last = first + size + (j < larger);
    Sum<T> sum = {};
    int count = 0;
    source.each(first, last, [&](int b, const auto& values) {
      const bool kept = is_finite(values.of[0]);
      sum.add(b, kept ? values.of[0] : T(0));
      count += kept;
    });
    const bool whole = asked.drop ? count > 0 : count == last - first;
    use(whole ? sum.get() / static_cast<T>(count) : kNan<T>);
    first = last;
  }
}

// The median of the means of up to `size` groups; each takes its place as it comes.
template <int size>
struct Means {
  static constexpr int owned = 1;

  template <typename T, typename Source>
  PC_DEVICE static void run(Source& source, const Asked<T>& asked, T (&result)[owned]) {
    Sorted<T, size> column;
    PC_UNROLL
    for (int i = 0; i < size; ++i) column.values[i] = kInfinity<T>;
    int count = 0;
    each_mean(source, asked, [&](T mean) {
      const bool kept = mean == mean;
      count += kept;
      T value = kept ? mean : kInfinity<T>;
      PC_UNROLL
      for (int i = 0; i < size; ++i) sort_two(column.values[i], value);
    });
    result[0] = count < asked.least(asked.k) ? kNan<T> : of_sorted(column, count, asked);
  }
};

}  // namespace pc
