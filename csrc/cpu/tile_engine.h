// The tile engine: per-example gradients G_b = sum_t g_bt x_bt^T, tile by tile in registers. Each
// tile is reduced as soon as its example ends, so no G_b is ever stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pc/vector.h"

namespace pc {

// What to make of the gradients; null where not wanted. Row-major, S segments, O x I parameter.
template <typename T>
struct Reduction {
  const T* coef = nullptr;       // [S], of sum; null for ones
  const T* direction = nullptr;  // [O, I], of dots
  T* sq_norms = nullptr;         // [S, tiles], summed over tiles by the caller; so are dots
  T* dots = nullptr;             // [S, tiles]
  T* sum = nullptr;              // [O, I]
  T* moment = nullptr;           // [O, I]
  T* sign = nullptr;             // [O, I]
};

// Rows of x [rows, I] and g [rows, O]; those from starts[s] to starts[s + 1] belong to segment s.
template <typename T>
struct Factors {
  const T* x;
  const T* g;
  int64_t in;
  int64_t out;
  std::vector<int64_t> starts;

  int64_t segments() const { return static_cast<int64_t>(starts.size()) - 1; }
};

// Columns that one vector register pair holds, and rows that are accumulated together: enough
// registers to hide the latency of an FMA.
template <typename T>
constexpr int64_t kLanes = 2 * VectorOf<T>::lanes;
constexpr int64_t kPanel = 4;

// Positions added up on their own, so that rounding does not grow with their number.
constexpr int64_t kBlock = 256;

// A parameter cut into tiles that depend on its shape alone, never on the number of threads: as
// large as the L2 cache holds, for the factors are packed anew for each, but several for the
// threads.
template <typename T>
struct Grid {
  static constexpr int64_t largest = 256, enough = 8;

  Grid(int64_t out, int64_t in)
      : out(out), in(in), height(round(out, 8)), width(round(in, kLanes<T>)) {
    height = std::min(height, largest);
    width = std::min(width, largest);
    while (tiles() < enough && (height > 8 || width > kLanes<T>)) {
      if (height >= width || width == kLanes<T>) {
        height = round(height / 2, 8);
      } else {
        width = round(width / 2, kLanes<T>);
      }
    }
  }

  static int64_t round(int64_t size, int64_t step) {
    return std::max(step, (size + step - 1) / step * step);
  }
  int64_t columns() const { return (in + width - 1) / width; }
  int64_t tiles() const { return (out + height - 1) / height * columns(); }

  int64_t out;
  int64_t in;
  int64_t height;
  int64_t width;
};

// One tile of all segments: its place, and its outputs padded to [height, width].
template <typename T>
struct Tile {
  Tile(const Grid<T>& grid, int64_t index)
      : in(grid.in),
        width(grid.width),
        first_out(index / grid.columns() * grid.height),
        first_in(index % grid.columns() * grid.width),
        rows(std::min(grid.height, grid.out - first_out)),
        used(std::min(grid.width, grid.in - first_in)) {}

  Buffer<T> zeros(bool wanted) const { return Buffer<T>(wanted ? rows * width : 0); }

  Buffer<T> gather(const T* parameter) const {
    Buffer<T> padded = zeros(parameter != nullptr);
    if (parameter != nullptr) {
      for (int64_t o = 0; o < rows; ++o) {
        std::copy_n(parameter + (first_out + o) * in + first_in, used, padded.data() + o * width);
      }
    }
    return padded;
  }

  void scatter(const Buffer<T>& padded, T* parameter) const {
    if (parameter != nullptr) {
      for (int64_t o = 0; o < rows; ++o) {
        std::copy_n(padded.data() + o * width, used, parameter + (first_out + o) * in + first_in);
      }
    }
  }

  int64_t in;
  int64_t width;
  int64_t first_out;
  int64_t first_in;
  int64_t rows;  // rows and columns of the tile that the parameter has
  int64_t used;
};

// Pointers into the padded outputs of one tile, and the running reductions of one segment.
template <typename T>
struct Epilogue {
  const T* direction;
  T* sum;
  T* moment;
  T* sign;
  bool add;  // whether this segment counts in sum
  T coef;
  Vector<T> sq_norm;
  Vector<T> dot;

  // value: a vector of one row of the tile's G_b, at offset.
  PC_INLINE void operator()(Vector<T> value, int64_t offset) {
    sq_norm += value * value;
    if (direction != nullptr) dot += value * load(direction + offset);
    if (add) store(sum + offset, load(sum + offset) + coef * value);
    if (moment != nullptr) store(moment + offset, load(moment + offset) + value * value);
    if (sign != nullptr) {
      const Vector<T> zero = {}, one = zero + 1;
      const Vector<T> nan = value == value ? zero : value;
      const Vector<T> signs = (value > 0 ? one : zero) - (value < 0 ? one : zero) + nan;
      store(sign + offset, load(sign + offset) + signs);
    }
  }
};

// A panel of rows and a register pair of columns: accumulate over positions in registers, then
// reduce the first `rows` rows and `used` columns. x: [positions, kLanes], padded with zeros; g:
// [positions, kPanel]; rows of the tile: apart by stride.
template <typename T>
PC_INLINE void reduce_panel(const T* x, const T* g, int64_t positions, int64_t rows, int64_t used,
                            int64_t offset, int64_t stride, Epilogue<T>& epilogue) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vector<T> low[kPanel] = {}, high[kPanel] = {};
  for (int64_t first = 0; first < positions; first += kBlock) {
    Vector<T> block_low[kPanel] = {}, block_high[kPanel] = {};
    const int64_t last = std::min(first + kBlock, positions);
    for (int64_t t = first; t < last; ++t) {
      const Vector<T> x_low = load(x + t * 2 * lanes), x_high = load(x + t * 2 * lanes + lanes);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kPanel; ++r) {
        block_low[r] += g[t * kPanel + r] * x_low;
        block_high[r] += g[t * kPanel + r] * x_high;
      }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < kPanel; ++r) {
      low[r] += block_low[r];
      high[r] += block_high[r];
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < kPanel; ++r) {
    if (r >= rows) break;
    // Padding times an infinite factor is not zero, so it is masked.
    epilogue(first_lanes<T>(low[r], used), offset + r * stride);
    epilogue(first_lanes<T>(high[r], used - lanes), offset + r * stride + lanes);
  }
}

template <typename T>
PC_INLINE T total(Vector<T> value) {
  T result = 0;
  for (int i = 0; i < VectorOf<T>::lanes; ++i) result += value[i];
  return result;
}

// The factors of one segment that meet in a tile, copied to where a panel reads them in order.
template <typename T>
struct Packed {
  Buffer<T> x;  // [width / kLanes, positions, kLanes]
  Buffer<T> g;  // [rows / kPanel, positions, kPanel]

  PC_INLINE void fill(const Factors<T>& factors, const Tile<T>& tile, int64_t first,
                      int64_t positions) {
    x.resize(Grid<T>::round(tile.used, kLanes<T>) * positions);
    g.resize(Grid<T>::round(tile.rows, kPanel) * positions);
    pack<kLanes<T>>(factors.x + first * factors.in + tile.first_in, factors.in, tile.used,
                    positions, x.data());
    pack<kPanel>(factors.g + first * factors.out + tile.first_out, factors.out, tile.rows,
                 positions, g.data());
  }

 private:
  // [rows, used], rows apart by stride, to [used / size, rows, size], padded with zeros.
  template <int64_t size>
  static PC_INLINE void pack(const T* from, int64_t stride, int64_t used, int64_t rows, T* to) {
    for (int64_t column = 0; column < used; column += size, from += size, to += rows * size) {
      if (column + size <= used) {
        for (int64_t t = 0; t < rows; ++t)
          std::memcpy(to + t * size, from + t * stride, size * sizeof(T));
      } else {
        std::fill_n(to, rows * size, T{0});
        for (int64_t t = 0; t < rows; ++t)
          std::copy_n(from + t * stride, used - column, to + t * size);
      }
    }
  }
};

// All segments of one tile.
template <typename T>
PC_INLINE void reduce_tile(const Factors<T>& factors, const Grid<T>& grid, int64_t index,
                           const Reduction<T>& to) {
  const Tile<T> tile(grid, index);
  const int64_t tiles = grid.tiles();
  const Buffer<T> direction = tile.gather(to.direction);
  Buffer<T> sum = tile.zeros(to.sum), moment = tile.zeros(to.moment), sign = tile.zeros(to.sign);
  const auto wanted = [](auto& values) { return values.empty() ? nullptr : values.data(); };
  Packed<T> packed;
  for (int64_t s = 0; s < factors.segments(); ++s) {
    const int64_t first = factors.starts[s], positions = factors.starts[s + 1] - first;
    packed.fill(factors, tile, first, positions);
    const T coef = to.coef == nullptr ? T{1} : to.coef[s];
    Epilogue<T> epilogue{wanted(direction),
                         wanted(sum),
                         wanted(moment),
                         wanted(sign),
                         to.sum != nullptr && coef != 0,
                         coef,
                         {},
                         {}};
    for (int64_t i = 0; i < tile.used; i += kLanes<T>) {
      for (int64_t o = 0; o < tile.rows; o += kPanel) {
        reduce_panel<T>(packed.x.data() + i * positions, packed.g.data() + o * positions, positions,
                        tile.rows - o, tile.used - i, o * tile.width + i, tile.width, epilogue);
      }
    }
    if (to.sq_norms) to.sq_norms[s * tiles + index] = total<T>(epilogue.sq_norm);
    if (to.dots) to.dots[s * tiles + index] = total<T>(epilogue.dot);
  }
  tile.scatter(sum, to.sum);
  tile.scatter(moment, to.moment);
  tile.scatter(sign, to.sign);
}

}  // namespace pc
