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

// A parameter cut into tiles that depend on its shape alone, never on the number of threads.
template <typename T>
struct Grid {
  static constexpr int64_t width = 2 * VectorOf<T>::lanes;

  explicit Grid(int64_t out, int64_t in)
      : height(std::clamp((out / 4 + 7) / 8 * 8, int64_t{8}, int64_t{256})),
        rows((out + height - 1) / height),
        columns((in + width - 1) / width) {}

  int64_t tiles() const { return rows * columns; }

  int64_t height;
  int64_t rows;
  int64_t columns;
};

// One tile of all segments: its place, and its outputs padded to whole vectors.
template <typename T>
struct Tile {
  static constexpr int64_t width = Grid<T>::width;

  Tile(const Factors<T>& factors, const Grid<T>& grid, int64_t index)
      : first_out(index / grid.columns * grid.height),
        first_in(index % grid.columns * width),
        height(std::min(grid.height, factors.out - first_out)),
        used(std::min(width, factors.in - first_in)) {}

  Buffer<T> zeros(bool wanted) const { return Buffer<T>(wanted ? height * width : 0); }

  Buffer<T> gather(const T* parameter, int64_t in) const {
    Buffer<T> padded = zeros(parameter != nullptr);
    if (parameter != nullptr) {
      for (int64_t o = 0; o < height; ++o) {
        const T* row = parameter + (first_out + o) * in + first_in;
        std::copy_n(row, used, padded.data() + o * width);
      }
    }
    return padded;
  }

  void scatter(const Buffer<T>& padded, T* parameter, int64_t in) const {
    if (parameter != nullptr) {
      for (int64_t o = 0; o < height; ++o) {
        T* row = parameter + (first_out + o) * in + first_in;
        std::copy_n(padded.data() + o * width, used, row);
      }
    }
  }

  int64_t first_out;
  int64_t first_in;
  int64_t height;
  int64_t used;  // columns of the tile that the parameter has
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

// Rows of a tile that are accumulated together: enough registers to hide the latency of an FMA.
constexpr int64_t kPanel = 4;

// Positions added up on their own, so that rounding does not grow with their number.
constexpr int64_t kBlock = 256;

// One panel of rows: accumulate over positions in registers, then reduce the first `rows` of it.
// x: [positions, width], padded with zeros; g: [positions, kPanel]; inside: [width], 1 or 0.
template <typename T>
PC_INLINE void reduce_panel(const T* x, const T* g, int64_t positions, const T* inside,
                            int64_t offset, int64_t rows, Epilogue<T>& epilogue) {
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
  // Padding times an infinite factor is not zero, so it is masked.
  const Vector<T> zero = {}, low_mask = load(inside), high_mask = load(inside + lanes);
#pragma GCC unroll 4
  for (int64_t r = 0; r < kPanel; ++r) {
    if (r >= rows) break;
    epilogue(low_mask > 0 ? low[r] : zero, offset + r * 2 * lanes);
    epilogue(high_mask > 0 ? high[r] : zero, offset + r * 2 * lanes + lanes);
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
  Buffer<T> x;  // [positions, width]
  Buffer<T> g;  // [panels, positions, kPanel]

  PC_INLINE void fill(const Factors<T>& factors, const Tile<T>& tile, int64_t first,
                      int64_t positions) {
    constexpr int64_t width = Grid<T>::width;
    const int64_t panels = (tile.height + kPanel - 1) / kPanel;
    x.resize(positions * width);
    g.resize(panels * positions * kPanel);
    const T* x_from = factors.x + first * factors.in + tile.first_in;
    const T* g_from = factors.g + first * factors.out + tile.first_out;
    copy_rows<width>(x_from, factors.in, tile.used, x.data(), positions);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t o = panel * kPanel;
      copy_rows<kPanel>(g_from + o, factors.out, std::min(kPanel, tile.height - o),
                        g.data() + o * positions, positions);
    }
  }

 private:
  // Rows of `used` values, apart by stride, to rows of `size` padded with zeros.
  template <int64_t size>
  static PC_INLINE void copy_rows(const T* from, int64_t stride, int64_t used, T* to,
                                  int64_t rows) {
    if (used == size) {
      for (int64_t t = 0; t < rows; ++t)
        std::memcpy(to + t * size, from + t * stride, size * sizeof(T));
      return;
    }
    std::fill_n(to, rows * size, T{0});
    for (int64_t t = 0; t < rows; ++t) std::copy_n(from + t * stride, used, to + t * size);
  }
};

// All segments of one tile.
template <typename T>
PC_INLINE void reduce_tile(const Factors<T>& factors, const Grid<T>& grid, int64_t index,
                           const Reduction<T>& to) {
  constexpr int64_t width = Grid<T>::width;
  const Tile<T> tile(factors, grid, index);
  const Buffer<T> direction = tile.gather(to.direction, factors.in);
  Buffer<T> sum = tile.zeros(to.sum), moment = tile.zeros(to.moment);
  Buffer<T> sign = tile.zeros(to.sign), inside(width);
  std::fill_n(inside.data(), tile.used, T{1});
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
    for (int64_t o = 0; o < tile.height; o += kPanel) {
      reduce_panel<T>(packed.x.data(), packed.g.data() + o * positions, positions, inside.data(),
                      o * width, tile.height - o, epilogue);
    }
    if (to.sq_norms) to.sq_norms[s * grid.tiles() + index] = total<T>(epilogue.sq_norm);
    if (to.dots) to.dots[s * grid.tiles() + index] = total<T>(epilogue.dot);
  }
  tile.scatter(sum, to.sum, factors.in);
  tile.scatter(moment, to.moment, factors.in);
  tile.scatter(sign, to.sign, factors.in);
}

}  // namespace pc
