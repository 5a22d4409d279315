// The tile engine: per-example gradients G_b = sum_t g_bt x_bt^T, tile by tile in registers. Each
// tile is reduced as soon as its example ends, so no G_b is ever stored.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pc/vector.h"
#include "reduction.h"

namespace pc {

// Where the engine takes its factors from. A Source has members
//   int64_t segments                     examples, or parts of the sum over all of them
//   int64_t positions(s)                 of segment s
//   void pack_x(s, first, used, to)      columns of x, to [used / kLanes, positions, kLanes], and
//   void pack_g(s, first, used, to)      columns of g, to [used / kPanel, positions, kPanel], both
//                                        padded with zeros

// Columns that one vector register pair holds, and rows that are accumulated together: enough
// registers to hide the latency of an FMA.
template <typename T>
constexpr int64_t kLanes = 2 * VectorOf<T>::lanes;
constexpr int64_t kPanel = 4;

// Positions, and segments, added up on their own, so that rounding does not grow with their number.
constexpr int64_t kBlock = 256;

inline int64_t round_up(int64_t size, int64_t step) {
  return std::max(step, (size + step - 1) / step * step);
}

// A parameter cut into tiles that depend on its shape alone, never on the number of threads: as
// large as the L2 cache holds, for the factors are packed anew for each, but several for the
// threads.
template <typename T>
struct Grid {
  static constexpr int64_t largest = 256, enough = 8;

  Grid(int64_t out, int64_t in)
      : out(out), in(in), height(round_up(out, 8)), width(round_up(in, kLanes<T>)) {
    height = std::min(height, largest);
    width = std::min(width, largest);
    while (tiles() < enough && (height > 8 || width > kLanes<T>)) {
      if (height >= width || width == kLanes<T>) {
        height = round_up(height / 2, 8);
      } else {
        width = round_up(width / 2, kLanes<T>);
      }
    }
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

  // Adds to the parameter, and starts again from zero.
  PC_INLINE void flush(Buffer<T>& padded, T* parameter) const {
    if (parameter != nullptr) {
      for (int64_t o = 0; o < rows; ++o) {
        const T* from = padded.data() + o * width;
        T* to = parameter + (first_out + o) * in + first_in;
        for (int64_t i = 0; i < used; ++i) to[i] += from[i];
      }
      std::fill(padded.begin(), padded.end(), T{0});
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
  Vector<T> sq_norm = {}, sq_norms = {};
  Vector<T> dot = {}, dots = {};

  // Ends a run of additions.
  PC_INLINE void flush() {
    sq_norms += sq_norm;
    dots += dot;
    sq_norm = dot = Vector<T>{};
  }

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

// Columns [positions, used], rows apart by stride, to [used / size, positions, size].
template <int64_t size, typename T>
PC_INLINE void pack_columns(const T* from, int64_t stride, int64_t used, int64_t positions, T* to) {
  for (int64_t i = 0; i < used; i += size, from += size, to += positions * size) {
    if (i + size <= used) {
      for (int64_t t = 0; t < positions; ++t) {
        std::memcpy(to + t * size, from + t * stride, size * sizeof(T));
      }
    } else {
      std::fill_n(to, positions * size, T{0});
      for (int64_t t = 0; t < positions; ++t) {
        std::copy_n(from + t * stride, used - i, to + t * size);
      }
    }
  }
}

// All segments of one tile. Partial norms and dots go to [segments, parts] at `part`.
template <typename T, typename Source>
PC_INLINE void reduce_tile(const Source& source, const Grid<T>& grid, int64_t index,
                           const Reduction<T>& to, int64_t part, int64_t parts) {
  const Tile<T> tile(grid, index);
  const Buffer<T> direction = tile.gather(to.direction);
  Buffer<T> sum = tile.zeros(to.sum), moment = tile.zeros(to.moment), sign = tile.zeros(to.sign);
  const auto wanted = [](auto& values) { return values.empty() ? nullptr : values.data(); };
  Buffer<T> x, g;
  for (int64_t s = 0; s < source.segments; ++s) {
    const int64_t positions = source.positions(s);
    x.resize(round_up(tile.used, kLanes<T>) * positions);
    g.resize(round_up(tile.rows, kPanel) * positions);
    source.pack_x(s, tile.first_in, tile.used, x.data());
    source.pack_g(s, tile.first_out, tile.rows, g.data());
    const T coef = to.coef == nullptr ? T{1} : to.coef[s];
    Epilogue<T> epilogue{wanted(direction),
                         wanted(sum),
                         wanted(moment),
                         wanted(sign),
                         to.sum != nullptr && coef != 0,
                         coef};
    for (int64_t i = 0; i < tile.used; i += kLanes<T>) {
      for (int64_t o = 0; o < tile.rows; o += kPanel) {
        reduce_panel<T>(x.data() + i * positions, g.data() + o * positions, positions,
                        tile.rows - o, tile.used - i, o * tile.width + i, tile.width, epilogue);
        if (o / kPanel % 8 == 7) epilogue.flush();
      }
      epilogue.flush();
    }
    if (to.sq_norms) to.sq_norms[s * parts + part] = total<T>(epilogue.sq_norms);
    if (to.dots) to.dots[s * parts + part] = total<T>(epilogue.dots);
    if (s % kBlock == kBlock - 1 || s == source.segments - 1) {
      tile.flush(sum, to.sum);
      tile.flush(moment, to.moment);
      tile.flush(sign, to.sign);
    }
  }
}

// Runs the engine over the tiles of `groups` parameters [out, in] that lie one behind the other.
// `tile(group, grid, index, to, part, parts)` is a clone of reduce_tile for the source of a group.
template <typename T, typename RunTile>
void run_engine(int64_t groups, int64_t segments, const Grid<T>& grid, const Reduction<T>& to,
                const RunTile& run_tile) {
  const int64_t tiles = grid.tiles(), parts = groups * tiles, size = grid.out * grid.in;
  std::vector<T> sq_norms(to.sq_norms ? segments * parts : 0), dots(to.dots ? segments * parts : 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t group = part / tiles;
      const auto at = [&](auto* parameter) {
        return parameter == nullptr ? nullptr : parameter + group * size;
      };
      const Reduction<T> mine{to.coef,
                              at(to.direction),
                              to.sq_norms ? sq_norms.data() : nullptr,
                              to.dots ? dots.data() : nullptr,
                              at(to.sum),
                              at(to.moment),
                              at(to.sign)};
      run_tile(group, grid, part % tiles, mine, part, parts);
    }
  });
  if (to.sq_norms) sum_parts(sq_norms, parts, to.sq_norms, segments);
  if (to.dots) sum_parts(dots, parts, to.dots, segments);
}

}  // namespace pc
