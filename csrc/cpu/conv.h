// The factors of a convolution weight's gradients: patches of the input, gathered when they are
// asked for, and output gradients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "maps.h"
#include "panels.h"
#include "reduction.h"

namespace pc {

// A window of up to four dimensions that moves over an input with its padding around it: what the
// tap meets at a position is at starts[position] + offsets[tap] there.
struct Window {
  int64_t taps = 1, inputs = 1, padded = 1, positions = 1;
  int64_t run = 1;                  // taps that meet neighbours in memory
  std::vector<int64_t> places{0};   // [inputs], where each of them is in the padded input
  std::vector<int64_t> starts{0};   // [positions]
  std::vector<int64_t> offsets{0};  // [taps]

  // sizes: of the input and of the output.
  Window(const std::vector<int64_t>& in_sizes, const std::vector<int64_t>& out_sizes,
         const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
    for (std::size_t d = 0; d < kernel.size(); ++d) {
      const int64_t size = in_sizes[d] + 2 * padding[d];
      extend(places, size, in_sizes[d], 1, padding[d]);
      extend(starts, size, out_sizes[d], stride[d], 0);
      extend(offsets, size, kernel[d], dilation[d], 0);
      taps *= kernel[d];
      inputs *= in_sizes[d];
      padded *= size;
      positions *= out_sizes[d];
    }
    if (dilation.back() == 1) run = kernel.back();
  }

  // Whether positions are inputs.
  bool pointwise() const { return taps == 1 && inputs == padded && positions == padded; }

 private:
  // Adds a dimension of `size`, with `count` indices from `first`, `step` apart.
  static void extend(std::vector<int64_t>& indices, int64_t size, int64_t count, int64_t step,
                     int64_t first) {
    std::vector<int64_t> result;
    for (const int64_t index : indices) {
      for (int64_t i = 0; i < count; ++i) result.push_back(index * size + first + i * step);
    }
    indices = std::move(result);
  }
};

// x of groups * channels and g of groups * out channels, a source of the tile engine: columns of x
// are taps times channels. A segment is an example, or a group of them.
template <typename T>
struct Patches {
  Patches(const Maps<T>& x, const Maps<T>& g, const Window& window, int64_t batch, int64_t groups)
      : x(x),
        g(g),
        window(window),
        batch(batch),
        groups(groups),
        channels(x.channels / groups),
        in(window.taps * channels),
        out(g.channels / groups),
        segments(batch) {}

  Patches grouped(int64_t groups) const {
    Patches result = *this;
    result.segments = groups;
    return result;
  }

  // Examples first .. last alone.
  Patches part(int64_t first, int64_t last) const {
    Patches result = *this;
    result.x.data += first * x.channels * x.positions;
    result.g.data += first * g.channels * g.positions;
    result.batch = result.segments = last - first;
    return result;
  }

  bool depthwise() const { return channels == 1 && out == 1; }

  // The first example of a segment.
  int64_t start(int64_t s) const { return group_start(s, segments, batch); }

  int64_t positions(int64_t s) const { return (start(s + 1) - start(s)) * window.positions; }

  PC_INLINE void pack_x(int64_t group, int64_t s, int64_t first, int64_t used, T* to) const {
    constexpr int64_t size = kLanes<T>;
    const int64_t rows = positions(s);
    for (int64_t b = start(s); b < start(s + 1); ++b, to += window.positions * size) {
      if (window.pointwise()) {
        x.template pack<size>(b, group * channels + first, used, rows, to);
        continue;
      }
      const Buffer<T> image = padded(b, group * channels, channels);
      for (int64_t i = 0; i < used; i += size) {
        const int64_t end = std::min(i + size, used);
        if (end < i + size) std::fill_n(to + i * rows, window.positions * size, T{0});
        gather(image, first + i, first + end, size, to + i * rows);
      }
    }
  }

  PC_INLINE void pack_g(int64_t group, int64_t s, int64_t first, int64_t used, T* to) const {
    const int64_t rows = positions(s);
    for (int64_t b = start(s); b < start(s + 1); ++b, to += window.positions * kPanel) {
      g.template pack<kPanel>(b, group * out + first, used, rows, to);
    }
  }

  // Some channels of one example with the padding around them, [padded, count].
  PC_INLINE Buffer<T> padded(int64_t b, int64_t first, int64_t count) const {
    Buffer<T> image(window.padded * count);
    if (window.padded > window.inputs) std::fill(image.begin(), image.end(), T{0});
    x.each(b, first, count, [&](int64_t t, int64_t i, auto value) PC_INLINED {
      put(image.data() + window.places[t] * count + i, value);
    });
    return image;
  }

  // Columns first .. last of the patches of an example, to rows apart by stride; image has the
  // channels of a group.
  PC_INLINE void gather(const Buffer<T>& image, int64_t first, int64_t last, int64_t stride,
                        T* to) const {
    const int64_t run = window.run * channels;
    for (int64_t i = first; i < last;) {
      const int64_t at = i % run, count = std::min(run - at, last - i);
      const T* from = image.data() + window.offsets[i / run * window.run] * channels + at;
      copy_rows<kLanes<T>>(from, count, stride, to + i - first);
      i += count;
    }
  }

  // All patches of an example, [positions, in].
  PC_INLINE void unfold(int64_t group, int64_t b, T* to) const {
    if (window.pointwise()) return x.copy(b, group * channels, channels, to);
    gather(padded(b, group * channels, channels), 0, in, in, to);
  }

  Maps<T> x, g;
  const Window& window;
  int64_t batch, groups, channels;
  int64_t in, out;
  int64_t segments;

 private:
  // `count` numbers at each position, in parts of sizes that are known.
  template <int64_t size>
  PC_INLINE void copy_rows(const T* from, int64_t count, int64_t stride, T* to) const {
    for (; count >= size; count -= size, from += size, to += size) {
      T* row = to;
      for (const int64_t start : window.starts) {
        copy_vector<size>(from + start * channels, row);
        row += stride;
      }
    }
    if constexpr (size > 1) copy_rows<size / 2>(from, count, stride, to);
  }

  template <int64_t size>
  PC_INLINE static void copy_vector(const T* from, T* to) {
    constexpr int64_t step = std::min(size, kLine<T>);
    using V = typename VectorOf<T, step * sizeof(T)>::type;
#pragma GCC unroll 2
    for (int64_t i = 0; i < size; i += step) store<V>(to + i, load<V>(from + i));
  }
};

// The kernels have taps before channels, the parameter has [rows, channels, taps].
template <typename T>
struct TapsFirst {
  int64_t rows, channels, taps;

  int64_t size() const { return rows * channels * taps; }

  Buffer<T> from_parameter(const T* parameter) const {
    Buffer<T> result(parameter == nullptr ? 0 : size());
    each([&](int64_t ours, int64_t theirs) { result[ours] = parameter[theirs]; }, parameter);
    return result;
  }

  void to_parameter(const Buffer<T>& values, T* parameter) const {
    each([&](int64_t ours, int64_t theirs) { parameter[theirs] = values[ours]; }, parameter);
  }

 private:
  template <typename Use>
  void each(const Use& use, const T* parameter) const {
    if (parameter == nullptr) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = row * taps * channels;
      for (int64_t channel = 0; channel < channels; ++channel) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          use(start + tap * channels + channel, start + channel * taps + tap);
        }
      }
    }
  }
};

// Writes all outputs of `to`, of a parameter in torch's order, by the cheapest way. Defined in
// conv_reduce.cpp, as is what follows.
template <typename T>
void reduce_conv(const Patches<T>& patches, const Reduction<T>& to);

// The outputs of the tile engine, for a parameter with its taps first.
template <typename T>
void run_conv(const Patches<T>& patches, const Reduction<T>& to);

// gram [B1, B2]: the dot products of the gradients of two batches.
template <typename T>
void gram_conv(const Patches<T>& a, const Patches<T>& b, T* gram);

}  // namespace pc
