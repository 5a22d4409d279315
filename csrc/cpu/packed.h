// The factors of a weight's gradients as the tile engine takes them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "panels.h"

namespace pc {

// The engine takes its factors from a Source. It has members
//   int64_t groups, in, out              parameters [out, in] that lie one behind the other
//   int64_t segments                     examples, or parts of the sum over all of them
//   int64_t positions(s)                 of segment s, at most positions(0)
//   void pack_x(group, s, first, used, to)   columns of x, to [used / kLanes, positions, kLanes]
//   void pack_g(group, s, first, used, to)   columns of g, to [used / kPanel, positions, kPanel],
//                                            both padded with zeros, and PC_INLINED

// One batch, or two, the first with the first `split` segments: their Gram is the dot
// products of one with the other.
template <typename Source>
struct Batches {
  Batches(const Source& one, const Source* two)
      : groups(one.groups),
        in(one.in),
        out(one.out),
        segments(one.segments + (two ? two->segments : 0)),
        split(one.segments),
        one_(one),
        two_(two) {}

  bool cross() const { return two_ != nullptr; }
  int64_t gram_size() const { return split * (cross() ? segments - split : split); }

  int64_t positions(int64_t s) const {
    return s < split ? one_.positions(s) : two_->positions(s - split);
  }

  int64_t most_positions() const {
    return std::max(one_.positions(0), cross() ? two_->positions(0) : 0);
  }

  PC_INLINE void pack_x(int64_t group, int64_t s, int64_t first, int64_t used, auto* to) const {
    of(s).pack_x(group, s < split ? s : s - split, first, used, to);
  }

  PC_INLINE void pack_g(int64_t group, int64_t s, int64_t first, int64_t used, auto* to) const {
    of(s).pack_g(group, s < split ? s : s - split, first, used, to);
  }

  int64_t groups, in, out;
  int64_t segments, split;

 private:
  PC_INLINE const Source& of(int64_t s) const { return s < split ? one_ : *two_; }

  const Source& one_;
  const Source* two_;
};

// All factors, packed once for all tiles.
template <typename T, typename Source>
class Packed {
 public:
  explicit Packed(const Source& source)
      : source_(source),
        x_size_(round_up(source.in, kLanes<T>) * source.most_positions()),
        g_size_(round_up(source.out, kPanel) * source.most_positions()) {}

  int64_t bytes() const {
    return source_.groups * source_.segments * (x_size_ + g_size_) * int64_t{sizeof(T)};
  }

  void pack() {
    constexpr int64_t columns = 256;
    const int64_t segments = source_.segments, both = source_.groups * segments;
    const int64_t x_blocks = (source_.in + columns - 1) / columns;
    const int64_t blocks = x_blocks + (source_.out + columns - 1) / columns;
    x_.resize(both * x_size_);
    g_.resize(both * g_size_);
    torch::stable::parallel_for(0, both * blocks, 1, [&](int64_t begin, int64_t end) {
      vectorized([&](auto) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t block = task % blocks, s = task / blocks % segments;
          const int64_t group = task / blocks / segments, positions = source_.positions(s);
          if (block < x_blocks) {
            const int64_t at = block * columns, used = std::min(columns, source_.in - at);
            source_.pack_x(group, s, at, used, x_.data() + start(group, s, x_size_, at, positions));
          } else {
            const int64_t at = (block - x_blocks) * columns;
            const int64_t used = std::min(columns, source_.out - at);
            source_.pack_g(group, s, at, used, g_.data() + start(group, s, g_size_, at, positions));
          }
        }
      });
    });
  }

  const T* x(int64_t group, int64_t s, int64_t column) const {
    return x_.data() + start(group, s, x_size_, column, source_.positions(s));
  }

  const T* g(int64_t group, int64_t s, int64_t column) const {
    return g_.data() + start(group, s, g_size_, column, source_.positions(s));
  }

 private:
  int64_t start(int64_t group, int64_t s, int64_t size, int64_t column, int64_t positions) const {
    return (group * source_.segments + s) * size + column * positions;
  }

  const Source& source_;
  int64_t x_size_, g_size_;
  Buffer<T> x_, g_;
};

}  // namespace pc
