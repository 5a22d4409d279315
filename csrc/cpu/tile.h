// One tile of a parameter: its place, its padded outputs, and what is done with a value there.
#pragma once

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "pc/vector.h"

namespace pc {

// A parameter cut into tiles that depend on shapes alone, never on the number of threads.
template <typename T>
struct Grid {
  // Tiles whose area and sides together are no larger than these, and at least `enough` of them.
  Grid(int64_t out, int64_t in, int64_t area, int64_t sides, int64_t enough)
      : out(out), in(in), height(round_up(out, kPanel)), width(round_up(in, kLanes<T>)) {
    const auto halve = [](int64_t& side, int64_t step) { side = round_up(side / 2, step); };
    const auto large = [&] { return height * width > area || height + width > sides; };
    while ((tiles() < enough || large()) && (height > kPanel || width > kLanes<T>)) {
      const bool high = width == kLanes<T> || (height >= width && height > kPanel);
      high ? halve(height, kPanel) : halve(width, kLanes<T>);
    }
  }

  int64_t columns() const { return (in + width - 1) / width; }
  int64_t tiles() const { return (out + height - 1) / height * columns(); }

  int64_t out;
  int64_t in;
  int64_t height;
  int64_t width;
};

template <typename T>
struct Tile {
  Tile(const Grid<T>& grid, int64_t index)
      : in(grid.in),
        first_out(index / grid.columns() * grid.height),
        first_in(index % grid.columns() * grid.width),
        rows(std::min(grid.height, grid.out - first_out)),
        used(std::min(grid.width, grid.in - first_in)),
        width(round_up(used, kLanes<T>)) {}

  int64_t in;
  int64_t first_out;
  int64_t first_in;
  int64_t rows;  // rows and columns of the tile that the parameter has
  int64_t used;
  int64_t width;  // of a padded row
};

// Rows of some columns of a tile; null where the output is not wanted.
template <typename T>
struct Place {
  T* data = nullptr;
  int64_t stride = 0;

  PC_INLINE T* at(int64_t row) const { return data + row * stride; }
};

// The part of one output in a tile. Vectors are stored to the parameter itself; columns that do not
// fill a panel are kept in padded rows of their own until the end, and with more segments than a
// block all are, so that blocks are added up on their own.
template <typename T>
class TileOutput {
 public:
  TileOutput(const Tile<T>& tile, T* parameter, int64_t segments)
      : tile_(tile),
        parameter_(parameter),
        padded_from_(segments > kBlock ? 0 : tile.used / kLanes<T> * kLanes<T>),
        padded_(parameter == nullptr ? 0 : tile.rows * (tile.width - padded_from_)) {}

  // A panel of columns, kLanes from i.
  PC_INLINE Place<T> place(int64_t i) {
    if (parameter_ == nullptr) return {};
    if (i < padded_from_) return {home(0) + i, tile_.in};
    return {padded_.data() + i - padded_from_, tile_.width - padded_from_};
  }

  // Ends the first block, or another.
  PC_INLINE void flush(bool first) {
    if (parameter_ == nullptr) return;
    for (int64_t row = 0; row < tile_.rows; ++row) {
      const T* from = padded_.data() + row * (tile_.width - padded_from_);
      T* to = home(row);
      for (int64_t i = padded_from_; i < tile_.used; ++i, ++from) {
        to[i] = first ? *from : to[i] + *from;
      }
    }
  }

 private:
  PC_INLINE T* home(int64_t row) const {
    return parameter_ + (tile_.first_out + row) * tile_.in + tile_.first_in;
  }

  const Tile<T>& tile_;
  T* parameter_;
  int64_t padded_from_;
  Buffer<T> padded_;
};

// The same of a direction.
template <typename T>
class TileInput {
 public:
  TileInput(const Tile<T>& tile, const T* parameter) : stride_(tile.width) {
    if (parameter == nullptr) return;
    padded_.assign(tile.rows * tile.width, T{0});
    for (int64_t row = 0; row < tile.rows; ++row) {
      std::copy_n(parameter + (tile.first_out + row) * tile.in + tile.first_in, tile.used,
                  padded_.data() + row * stride_);
    }
  }

  PC_INLINE Place<const T> place(int64_t i) const {
    return padded_.empty() ? Place<const T>{} : Place<const T>{padded_.data() + i, stride_};
  }

 private:
  int64_t stride_;
  Buffer<T> padded_;
};

// The places of a panel of columns, and the running reductions of one segment.
template <typename Machine, typename T>
struct Epilogue {
  using V = Vector<Machine, T>;

  T coef;
  bool fresh;  // whether this is the first segment of a block
  bool norms;  // whether squared norms are wanted
  Place<const T> direction = {};
  Place<T> weighted_sum = {}, second_moment = {}, sign_sum = {}, row = {};
  V sq_norms = {}, dots = {};

  // Whether all there is to do is a sum.
  PC_INLINE bool only_sum() const {
    return weighted_sum.data && coef == 1 && !norms && !direction.data && !second_moment.data &&
           !sign_sum.data && !row.data;
  }

  // values [rows, kLanes] of G_b, from row `first` of the tile.
  PC_INLINE void operator()(const T* values, int64_t first, int64_t rows) {
    V squares[2] = {};
    each(values, rows, [&](V value, int64_t, int64_t i) PC_INLINED {
      squares[i / kLanesOf<V> % 2] += value * value;
    });
    sq_norms += squares[0] + squares[1];
    if (direction.data) {
      V dot = {};
      each(values, rows, [&](V value, int64_t r, int64_t i) PC_INLINED {
        dot += value * load<V>(direction.at(first + r) + i);
      });
      dots += dot;
    }
    if (weighted_sum.data && coef == 0) {
      add(values, weighted_sum, first, rows, [](V) PC_INLINED { return V{}; });
    } else if (weighted_sum.data) {
      add(values, weighted_sum, first, rows, [&](V value) PC_INLINED { return coef * value; });
    }
    if (second_moment.data) {
      add(values, second_moment, first, rows, [](V value) PC_INLINED { return value * value; });
    }
    if (sign_sum.data) {
      add(values, sign_sum, first, rows, [](V value) PC_INLINED { return signs(value); });
    }
    if (row.data) {
      each(values, rows, [&](V value, int64_t r, int64_t i) PC_INLINED {
        store<V>(row.at(first + r) + i, value);
      });
    }
  }

 private:
  template <typename Use>
  PC_INLINE void each(const T* values, int64_t rows, const Use& use) const {
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes<T>; i += kLanesOf<V>) {
        use(load<V>(values + r * kLanes<T> + i), r, i);
      }
    }
  }

  template <typename Of>
  PC_INLINE void add(const T* values, const Place<T>& to, int64_t first, int64_t rows,
                     const Of& of) const {
    if (fresh) {
      each(values, rows, [&](V value, int64_t r, int64_t i) PC_INLINED {
        store<V>(to.at(first + r) + i, of(value));
      });
    } else {
      each(values, rows, [&](V value, int64_t r, int64_t i) PC_INLINED {
        T* at = to.at(first + r) + i;
        store<V>(at, load<V>(at) + of(value));
      });
    }
  }
};

}  // namespace pc
