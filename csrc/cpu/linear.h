// Rows of layer inputs and output gradients: a source of the tile engine, and what is made of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ghost.h"
#include "panels.h"
#include "reduction.h"

namespace pc {

// Rows of x [rows, in] and g [rows, out]; `length` of them make an example, the last one may have
// less. A segment is an example, or a group of them.
template <typename T>
struct Linear {
  Linear(const T* x, const T* g, int64_t in, int64_t out, int64_t batch, int64_t positions)
      : x(x), g(g), in(in), out(out), rows(batch * positions), length(positions), segments(batch) {}

  Linear grouped(int64_t groups) const {
    Linear result = *this;
    result.examples = segments;
    result.segments = groups;
    return result;
  }

  // The start of a segment, in rows.
  int64_t start(int64_t s) const {
    return length * (examples == 0 ? s : group_start(s, segments, examples));
  }
  int64_t positions(int64_t s) const { return std::min(start(s + 1), rows) - start(s); }

  PC_INLINE void pack_x(int64_t, int64_t s, int64_t first, int64_t used, T* to) const {
    const T* from = x + start(s) * in + first;
    const auto row = [&](int64_t t) PC_INLINED { return from + t * in; };
    pack_columns<kLanes<T>>(row, positions(s), used, to);
  }

  PC_INLINE void pack_g(int64_t, int64_t s, int64_t first, int64_t used, T* to) const {
    const T* from = g + start(s) * out + first;
    const auto row = [&](int64_t t) PC_INLINED { return from + t * out; };
    pack_columns<kPanel>(row, positions(s), used, to);
  }

  Factors<T> factors() const { return {{x, rows, in}, {g, rows, out}, in, out}; }

  const T* x;
  const T* g;
  int64_t in, out;
  int64_t rows, length, segments;
  int64_t examples = 0;  // of all groups; none if each is a segment
  int64_t groups = 1;
};

// Writes all outputs of `to`, by the cheapest way. Defined in linear_reduce.cpp.
template <typename T>
void reduce_linear(const Linear<T>& linear, const Reduction<T>& to);

// The outputs of the tile engine, whatever they cost. Defined in linear_reduce.cpp, once for
// all ops: it takes long to compile.
template <typename T>
void run_linear(const Linear<T>& linear, const Reduction<T>& to);

// gram [B1, B2]: the dot products of the gradients of two batches. Defined in linear_reduce.cpp.
template <typename T>
void gram_linear(const Linear<T>& a, const Linear<T>& b, T* gram);

}  // namespace pc
