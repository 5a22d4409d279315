// Matrix products in registers, of two kinds: sums over positions of outer products, from factors
// packed into panels; and dot products of rows as they lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "pc/vector.h"

namespace pc {

// Columns of x, and of g, in a panel: what the registers of the largest machine hold.
template <typename T>
constexpr int64_t kLanes = 2 * kLine<T>;
constexpr int64_t kPanel = 8;

// Positions, and segments, added up on their own, so that rounding does not grow with their number.
constexpr int64_t kBlock = 256;

// The start of group j of some examples; sizes differ by one at most, larger ones come first.
inline int64_t group_start(int64_t j, int64_t groups, int64_t count) {
  return j * (count / groups) + std::min(j, count % groups);
}

inline int64_t round_up(int64_t size, int64_t step) {
  return std::max(step, (size + step - 1) / step * step);
}

// Columns i .. of rows, `step` at a time while they end before `used`, to panels of `size`.
template <int64_t size, int64_t step, typename T, typename Row>
PC_INLINE void pack_steps(const Row& row, int64_t rows, int64_t used, int64_t& i, T* to) {
  constexpr int64_t run = std::min(size, kLine<T>);
  for (; i + step <= used; i += step) {
    for (int64_t t = 0; t < rows; ++t) {
      const T* from = row(t) + i;
      // Rows are too far apart for the machine to expect the next ones.
      const T* soon = row(std::min(t + 8, rows - 1)) + i;
#pragma GCC unroll 4
      for (int64_t j = 0; j < step; j += kLine<T>) __builtin_prefetch(soon + j);
#pragma GCC unroll 8
      for (int64_t j = 0; j < step; j += run) {
        T* at = to + i * rows + (j / size * rows + t) * size + j % size;
        std::memcpy(at, from + j, run * sizeof(T));
      }
    }
  }
}

// The same row by row, which memory prefers for panels as wide as these. Returns their columns.
template <int64_t size, typename T, typename Row>
PC_INLINE int64_t pack_rows(const Row& row, int64_t rows, int64_t used, T* to) {
  const int64_t columns = used / size * size;
  for (int64_t t = 0; t < rows; ++t) {
    const T* from = row(t);
    for (int64_t i = 0; i < columns; i += size) {
      std::memcpy(to + i * rows + t * size, from + i, size * sizeof(T));
    }
  }
  return columns;
}

// Rows [rows, used] to [used / size, rows, size], padded with zeros. row(t): where row t lies.
// Some lines of the cache of each row at a time, for the next rows may displace them.
template <int64_t size, typename T, typename Row>
PC_INLINE void pack_columns(const Row& row, int64_t rows, int64_t used, T* to) {
  int64_t i = 0;
  if constexpr (size < kLanes<T>) {
    pack_steps<size, 4 * kLine<T>>(row, rows, used, i, to);
    pack_steps<size, size>(row, rows, used, i, to);
  } else {
    i = pack_rows<size>(row, rows, used, to);
  }
  if (i == used) return;
  for (int64_t t = 0; t < rows; ++t) {
    const T* from = row(t) + i;
    T* at = to + i * rows + t * size;
    for (int64_t j = 0; j < size; ++j) at[j] = j < used - i ? from[j] : T{0};
  }
}

// out(r)[i] = sum_t g[t][r] * x[t][i], or is added to if not `fresh`, of a panel of each, x
// [positions, kLanes] and g [positions, kPanel]. out(r): where row r of the result lies.
template <typename Machine, typename T, typename Out>
PC_INLINE void multiply_panels(const T* x, const T* g, int64_t positions, bool fresh,
                               const Out& out) {
  using V = Vector<Machine, T>;
  constexpr int64_t lanes = kLanesOf<V>, rows = Machine::rows, vectors = Machine::vectors;
  for (int64_t row = 0; row < kPanel; row += rows) {
    for (int64_t column = 0; column < kLanes<T>; column += vectors * lanes) {
      for (int64_t first = 0; first == 0 || first < positions; first += kBlock) {
        V sums[rows][vectors] = {};
        const int64_t last = std::min(first + kBlock, positions);
        for (int64_t t = first; t < last; ++t) {
          V in[vectors];
          const T* from = x + t * kLanes<T> + column;
#pragma GCC unroll 2
          for (int64_t v = 0; v < vectors; ++v) {
            in[v] = load<V>(from + v * lanes);
            __builtin_prefetch(from + 12 * kLanes<T> + v * lanes);
          }
#pragma GCC unroll 8
          for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int64_t v = 0; v < vectors; ++v) sums[r][v] += g[t * kPanel + row + r] * in[v];
          }
        }
#pragma GCC unroll 8
        for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
          for (int64_t v = 0; v < vectors; ++v) {
            T* to = out(row + r) + column + v * lanes;
            store(to, first == 0 && fresh ? sums[r][v] : load<V>(to) + sums[r][v]);
          }
        }
      }
    }
  }
}

// Rows of a matrix in memory.
template <typename T>
struct Rows {
  const T* data;
  int64_t count;
  int64_t stride;

  PC_INLINE const T* operator()(int64_t i) const { return data + i * stride; }
};

// use(i, j, <a_i, b_j>) over the first `size` columns. Rows are taken several at a time, so that
// each is loaded for several products.
template <typename Machine, typename T, typename Use>
PC_INLINE void dot_rows(const Rows<T>& a, const Rows<T>& b, int64_t size, const Use& use) {
  using V = Vector<Machine, T>;
  constexpr int64_t lanes = kLanesOf<V>, high = 4, wide = Machine::rows / 2, many = high * wide;
  for (int64_t i = 0; i < a.count; i += high) {
    for (int64_t j = 0; j < b.count; j += wide) {
      const T *left[high], *right[wide];
#pragma GCC unroll 4
      for (int64_t k = 0; k < high; ++k) left[k] = a(std::min(i + k, a.count - 1));
#pragma GCC unroll 4
      for (int64_t k = 0; k < wide; ++k) right[k] = b(std::min(j + k, b.count - 1));
      V sums[many] = {};
      int64_t at = 0;
      for (; at + lanes <= size; at += lanes) {
        V values[wide];
#pragma GCC unroll 4
        for (int64_t k = 0; k < wide; ++k) values[k] = load<V>(right[k] + at);
#pragma GCC unroll 4
        for (int64_t r = 0; r < high; ++r) {
          const V value = load<V>(left[r] + at);
#pragma GCC unroll 4
          for (int64_t c = 0; c < wide; ++c) sums[r * wide + c] += value * values[c];
        }
      }
      // Sums are taken at a time that fill the lanes of a vector.
      T results[many];
      for (int64_t k = 0; k < many; k += lanes) {
        store<V>(results + k, totals<lanes / 2>(sums + k));
      }
#pragma GCC unroll 1
      for (int64_t k = 0; k < many; ++k) {
        const int64_t r = k / wide, c = k % wide;
        if (i + r >= a.count || j + c >= b.count) continue;
        T rest = 0;
        for (int64_t l = at; l < size; ++l) rest += left[r][l] * right[c][l];
        use(i + r, j + c, results[k] + rest);
      }
    }
  }
}

}  // namespace pc
