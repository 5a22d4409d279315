// Convolutions of one channel in and out of each group.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "conv.h"
#include "dense.h"
#include "row_gram.h"
#include "workspace.h"

namespace pc {

// sum_t g[t] * x[input[t]] of `count` channels, a step of `width` apart at each position: as many
// vectors at a time as hide the latency of an addition.
template <typename Machine, int64_t vectors, typename T>
PC_INLINE void sum_taps(const T* x, const T* g, const int64_t* input, int64_t positions,
                        int64_t width, T* to) {
  using V = Vector<Machine, T>;
  constexpr int64_t lanes = kLanesOf<V>;
  const T padding[vectors * lanes] = {};
  V sums[vectors] = {};
  for (int64_t start = 0; start < positions; start += kBlock) {
    V block[vectors] = {};
    for (int64_t t = start; t < std::min(start + kBlock, positions); ++t) {
      // A gradient that is not finite shows even where it meets the padding.
      const T *left = g + t * width, *right = input[t] < 0 ? padding : x + input[t] * width;
#pragma GCC unroll 4
      for (int64_t v = 0; v < vectors; ++v)
        block[v] += load<V>(left + v * lanes) * load<V>(right + v * lanes);
    }
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[v] += block[v];
  }
#pragma GCC unroll 4
  for (int64_t v = 0; v < vectors; ++v) store<V>(to + v * lanes, sums[v]);
}

// The same of channels that do not fill a vector.
template <typename T>
PC_INLINE void sum_taps(const T* x, const T* g, const int64_t* input, int64_t positions,
                        int64_t width, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) {
    T sum = 0;
    for (int64_t start = 0; start < positions; start += kBlock) {
      T block = 0;
      for (int64_t t = start; t < std::min(start + kBlock, positions); ++t) {
        block += g[t * width + c] * (input[t] < 0 ? T{0} : x[input[t] * width + c]);
      }
      sum += block;
    }
    to[c] = sum;
  }
}

// One channel in and out of each group: gradients [taps, channels first .. last] of one example.
template <typename Machine, typename T>
PC_INLINE void depthwise(const Patches<T>& patches, int64_t b, int64_t first, int64_t last, T* to) {
  constexpr int64_t lanes = kLanesOf<Vector<Machine, T>>;
  const int64_t width = patches.groups, positions = patches.window.positions;
  const T* x = patches.x + b * patches.window.inputs * width;
  const T* g = patches.g + b * positions * width;
  for (int64_t tap = 0; tap < patches.window.taps; ++tap, to += last - first) {
    const int64_t* input = patches.window.input.data() + tap * positions;
    int64_t c = first;
    for (; c + 4 * lanes <= last; c += 4 * lanes) {
      sum_taps<Machine, 4>(x + c, g + c, input, positions, width, to + c - first);
    }
    for (; c + lanes <= last; c += lanes) {
      sum_taps<Machine, 1>(x + c, g + c, input, positions, width, to + c - first);
    }
    sum_taps(x + c, g + c, input, positions, width, last - c, to + c - first);
  }
}

// The same of all examples, [B, taps, channels].
template <typename T>
Buffer<T> depthwise_rows(const Patches<T>& patches, int64_t first, int64_t last) {
  const int64_t size = (last - first) * patches.window.taps;
  Buffer<T> rows(patches.batch * size);
  torch::stable::parallel_for(0, patches.batch, 1, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t b = begin; b < end; ++b) {
        depthwise<decltype(machine)>(patches, b, first, last, rows.data() + b * size);
      }
    });
  });
  return rows;
}

// Of so many examples, as the workspace has room for.
template <typename T>
int64_t channels_at_once(const Patches<T>& patches, int64_t batch) {
  const int64_t room = workspace() / 4 / int64_t{sizeof(T)} / (batch * patches.window.taps);
  return std::min(patches.groups, std::max<int64_t>(room / 16 * 16, 16));
}

// The parameter is [channels, taps]; some channels at a time, [taps, channels], are there for all
// examples.
template <typename T>
void reduce_depthwise(const Patches<T>& patches, const Reduction<T>& to) {
  const int64_t taps = patches.window.taps, batch = patches.batch, all = patches.groups;
  const int64_t step = channels_at_once(patches, batch);
  Reduction<T> inner = to;
  Buffer<T> along(to.direction ? all * taps : 0), sum(to.sum ? all * taps : 0);
  Buffer<T> moment(to.moment ? all * taps : 0), sign(to.sign ? all * taps : 0);
  const auto each = [&](const auto& use) {
    for (int64_t first = 0; first < all; first += step) {
      const int64_t count = std::min(step, all - first);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < count; ++c) {
          use(first * taps + tap * count + c, (first + c) * taps + tap);
        }
      }
    }
  };
  if (to.direction) each([&](int64_t i, int64_t j) { along[i] = to.direction[j]; });
  inner.direction = to.direction ? along.data() : nullptr;
  inner.sum = to.sum ? sum.data() : nullptr;
  inner.moment = to.moment ? moment.data() : nullptr;
  inner.sign = to.sign ? sign.data() : nullptr;
  Dense<T> dense(batch, inner);
  for (int64_t first = 0; first < all; first += step) {
    const int64_t last = std::min(first + step, all), size = (last - first) * taps;
    const Buffer<T> rows = depthwise_rows(patches, first, last);
    dense.add({rows.data(), batch, size}, first * taps, size);
  }
  dense.finish();
  if (to.sum) each([&](int64_t i, int64_t j) { to.sum[j] = sum[i]; });
  if (to.moment) each([&](int64_t i, int64_t j) { to.moment[j] = moment[i]; });
  if (to.sign) each([&](int64_t i, int64_t j) { to.sign[j] = sign[i]; });
}

// gram [B1, B2] of two batches.
template <typename T>
void gram_depthwise(const Patches<T>& a, const Patches<T>& b, T* gram) {
  const int64_t step = channels_at_once(a, a.batch + b.batch);
  std::fill_n(gram, a.batch * b.batch, T{0});
  for (int64_t first = 0; first < a.groups; first += step) {
    const int64_t last = std::min(first + step, a.groups), size = (last - first) * a.window.taps;
    const Buffer<T> left = depthwise_rows(a, first, last), right = depthwise_rows(b, first, last);
    RowGram<T>({left.data(), a.batch, size}, {right.data(), b.batch, size}, size, false)
        .add_to(gram);
  }
}

}  // namespace pc
