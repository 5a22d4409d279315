// Feature maps: channels at positions, copied from either order in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "pc/vector.h"

namespace pc {

// Square blocks of these are transposed in registers. More rows at a time, whose distance is often
// a power of two, would displace each other from the cache.
template <typename T>
using Short = typename VectorOf<T, 32>::type;

// Transposes vectors in pairs that are `step` apart, then those that are half of it apart.
template <int step, typename V>
PC_INLINE void transpose_block(V* rows) {
  if constexpr (step > 0) {
    constexpr int lanes = kLanesOf<V>;
#pragma GCC unroll 8
    for (int i = 0; i < lanes; ++i) {
      if (i & step) continue;
      const V a = rows[i], b = rows[i + step];
      rows[i] = halves<step, false>(a, b, std::make_index_sequence<lanes>());
      rows[i + step] = halves<step, true>(a, b, std::make_index_sequence<lanes>());
    }
    transpose_block<step / 2>(rows);
  }
}

// A vector or a number to anywhere in memory.
template <typename T, typename V>
PC_INLINE void put(T* to, V value) {
  if constexpr (sizeof(V) == sizeof(T)) {
    *to = value;
  } else {
    store<V>(to, value);
  }
}

// use(column, row, value) for all of from [rows, columns], rows `stride` apart: a vector of what is
// in the column from that row on, or a number of it.
template <typename T, typename Use>
PC_INLINE void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns,
                         const Use& use) {
  using V = Short<T>;
  constexpr int64_t lanes = kLanesOf<V>;
  const int64_t full_columns = columns / lanes * lanes;
  int64_t row = 0;
  for (; row + lanes <= rows; row += lanes) {
    for (int64_t column = 0; column < full_columns; column += lanes) {
      V block[lanes];
#pragma GCC unroll 8
      for (int64_t i = 0; i < lanes; ++i) block[i] = load<V>(from + (row + i) * stride + column);
      transpose_block<lanes / 2>(block);
#pragma GCC unroll 8
      for (int64_t i = 0; i < lanes; ++i) use(column + i, row, block[i]);
    }
    for (int64_t column = full_columns; column < columns; ++column) {
      V value;
#pragma GCC unroll 8
      for (int64_t i = 0; i < lanes; ++i) value[i] = from[(row + i) * stride + column];
      use(column, row, value);
    }
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      use(column, row, from[row * stride + column]);
    }
  }
}

// [B, channels, positions], or with the channels last.
template <typename T>
struct Maps {
  // use(position, channel - first, value) for `count` channels of example b, as in transpose.
  template <typename Use>
  PC_INLINE void each(int64_t b, int64_t first, int64_t count, const Use& use) const {
    using V = Short<T>;
    constexpr int64_t lanes = kLanesOf<V>;
    const T* from = data + b * channels * positions;
    if (!channels_last)
      return transpose(from + first * positions, positions, count, positions, use);
    for (int64_t t = 0; t < positions; ++t) {
      const T* row = from + t * channels + first;
      int64_t i = 0;
      for (; i + lanes <= count; i += lanes) use(t, i, load<V>(row + i));
      for (; i < count; ++i) use(t, i, row[i]);
    }
  }

  // Some channels of example b to rows [positions, count].
  PC_INLINE void copy(int64_t b, int64_t first, int64_t count, T* to) const {
    each(b, first, count,
         [&](int64_t t, int64_t i, auto value) PC_INLINED { put(to + t * count + i, value); });
  }

  // The same to panels of `size` columns, [count / size, rows, size], padded with zeros.
  template <int64_t size>
  PC_INLINE void pack(int64_t b, int64_t first, int64_t count, int64_t rows, T* to) const {
    const int64_t full = count / size * size;
    if (full < count) std::fill_n(to + full * rows, positions * size, T{0});
    each(b, first, count, [&](int64_t t, int64_t i, auto value) PC_INLINED {
      put(to + i / size * size * rows + t * size + i % size, value);
    });
  }

  const T* data;
  int64_t channels, positions;
  bool channels_last;
};

}  // namespace pc
