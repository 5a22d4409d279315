// Lookups of a table on CUDA in the order of their ids, as warps walk through them: a run is all
// lookups of one id, a segment those of one id by one example.
#pragma once

#include <cstdint>
#include <type_traits>

#include "pc/device.cuh"

namespace pc {

constexpr int kLanes = 32;

// The dtype that numbers are added up in.
template <typename scalar_t>
using SumOf = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Some columns of a row, of one lane, which is loaded at once.
template <typename T, int owned>
struct alignas(owned * sizeof(T)) Columns {
  T of[owned];
};

template <typename scalar_t>
PC_DEVICE SumOf<scalar_t> widen(scalar_t value) {
  if constexpr (sizeof(scalar_t) == 2) {
    return to_float(value);
  } else {
    return value;
  }
}

// The lane's columns of a row, zeros where it has none.
template <int owned, typename T>
PC_DEVICE Columns<T, owned> load_columns(const T* row, int64_t column, int64_t width) {
  if (column >= width) return {};
  return *reinterpret_cast<const Columns<T, owned>*>(row + column);
}

template <typename T, int owned>
PC_DEVICE void store_columns(const Columns<T, owned>& values, T* row, int64_t column,
                             int64_t width) {
  if (column < width) *reinterpret_cast<Columns<T, owned>*>(row + column) = values;
}

// Their dot product over the lanes, in all of them.
template <typename T, int owned>
PC_DEVICE T warp_dot(const Columns<T, owned>& a, const Columns<T, owned>& b) {
  T sum = 0;
  PC_UNROLL
  for (int c = 0; c < owned; ++c) sum += a.of[c] * b.of[c];
  PC_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// The sum over the threads of a block, in its first one. Shared memory: [warps].
PC_DEVICE double block_sum(double sum) {
  PC_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  auto* shared = shared_memory<double>();
  if (thread() % kLanes == 0) shared[thread() / kLanes] = sum;
  sync();
  if (thread() != 0) return 0;
  for (int warp = 1; warp < threads() / kLanes; ++warp) sum += shared[warp];
  return sum;
}

// A sum in blocks, which are added up in double so that it does not drift.
template <typename T>
struct Blocked {
  T block;
  double total;

  // The n-th value.
  PC_DEVICE void add(int64_t n, T value) {
    block += value;
    if ((n & 63) != 63) return;
    total += block;
    block = 0;
  }

  // The sum of n values.
  PC_DEVICE T get(int64_t n) const { return n < 64 ? block : static_cast<T>(total + block); }
};

// The first of begin .. end for which it is true, as for all after it.
template <typename Test>
PC_DEVICE int64_t first_of(int64_t begin, int64_t end, const Test& test) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (test(middle)) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// The same from `begin` on, by a warp together: for ends that are near.
template <typename Test>
PC_DEVICE int64_t first_near(int64_t begin, const Test& test) {
  for (;; begin += kLanes) {
    const uint32_t found = ballot(test(begin + thread() % kLanes));
    if (found != 0) return begin + lowest_bit(found);
  }
}

template <typename scalar_t>
struct Lookups {
  const int64_t* ids;     // [count]
  const int64_t* places;  // [count], their rows of g, increasing in a run; null if they are as in g
  const scalar_t* g;      // [count, width]
  int64_t count, positions, width;

  PC_DEVICE int64_t place(int64_t i) const { return places == nullptr ? i : places[i]; }
  PC_DEVICE int64_t example(int64_t i) const { return place(i) / positions; }

  PC_DEVICE bool begins_run(int64_t i) const { return i == 0 || ids[i - 1] != ids[i]; }
  PC_DEVICE bool begins_segment(int64_t i) const {
    return begins_run(i) || place(i - 1) < example(i) * positions;
  }

  // The end of the run, or of the segment, that begins at i.
  PC_DEVICE int64_t run_end(int64_t i) const {
    const int64_t id = ids[i];
    return first_near(i, [&](int64_t j) { return j >= count || ids[j] != id; });
  }

  PC_DEVICE int64_t segment_end(int64_t i) const {
    const int64_t id = ids[i], limit = (example(i) + 1) * positions;
    return first_near(i,
                      [&](int64_t j) { return j >= count || ids[j] != id || place(j) >= limit; });
  }
};

// Columns that a lane takes of long rows: 16 bytes of sums.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

// Whether it can.
template <typename T, typename scalar_t>
bool takes_wide(const scalar_t* rows, int64_t width) {
  return width > 2 * kLanes && width % kWide<T> == 0 &&
         reinterpret_cast<uintptr_t>(rows) % (kWide<T> * sizeof(scalar_t)) == 0;
}

// How often the warps take `owned` columns of each lane.
inline int64_t tiles_of(int64_t columns, int owned) {
  return (columns + kLanes * owned - 1) / (kLanes * owned);
}

// Blocks of some threads for this many warps.
inline int64_t blocks_of(int64_t warps, int threads) {
  return (warps * kLanes + threads - 1) / threads;
}

// Calls use(place, example, sum) for each segment of begin .. end, which are in one run and begin
// and end with segments: its first row of g, its example, and what its rows add up to in the
// columns of the lane.
template <int owned, typename scalar_t, typename Use>
PC_DEVICE void each_segment(const Lookups<scalar_t>& lookups, int64_t begin, int64_t end,
                            int64_t column, const Use& use) {
  using T = SumOf<scalar_t>;
  constexpr int kAhead = 4;  // rows that are under way together
  Blocked<T> sums[owned] = {};
  int64_t first = 0, example = 0, limit = 0, n = 0;
  for (int64_t i = begin; i < end; i += kAhead) {
    int64_t places[kAhead + 1];
    Columns<scalar_t, owned> rows[kAhead];
    PC_UNROLL
    for (int k = 0; k <= kAhead; ++k) {
      places[k] = i + k < end ? lookups.place(i + k) : INT64_MAX;
    }
    PC_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= end) break;
      const scalar_t* row = lookups.g + places[k] * lookups.width;
      rows[k] = load_columns<owned>(row, column, lookups.width);
    }
    PC_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      if (i + k >= end) break;
      if (n == 0) {
        first = places[k];
        example = first / lookups.positions;
        limit = (example + 1) * lookups.positions;
      }
      PC_UNROLL
      for (int c = 0; c < owned; ++c) sums[c].add(n, widen(rows[k].of[c]));
      ++n;
      if (places[k + 1] < limit) continue;
      Columns<T, owned> sum;
      PC_UNROLL
      for (int c = 0; c < owned; ++c) {
        sum.of[c] = sums[c].get(n);
        sums[c] = {};
      }
      n = 0;
      use(first, example, sum);
    }
  }
}

}  // namespace pc
