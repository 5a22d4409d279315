// Convolutions of one channel in and out of each group.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv.h"
#include "dense.h"
#include "row_gram.h"
#include "workspace.h"

namespace pc {

// Rows of channels at positions and at inputs, and where taps meet them.
template <typename T>
struct DepthwiseRows {
  const T *x, *g;
  int64_t width;
  const std::vector<int64_t>&starts, &offsets;

  // sum_t g[t] * x[starts[t] + offsets[tap]], rows [taps, width], of some taps and vectors of
  // channels from c: enough at a time to hide the latency of an addition.
  template <typename V, int64_t taps, int64_t vectors>
  PC_INLINE void sum(int64_t tap, int64_t c, T* to) const {
    constexpr int64_t lanes = kLanesOf<V>;
    const int64_t positions = static_cast<int64_t>(starts.size());
    const T* from[taps];
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) from[k] = x + offsets[tap + k] * width + c;
    V sums[taps][vectors] = {};
    for (int64_t start = 0; start < positions; start += kBlock) {
      V block[taps][vectors] = {};
      for (int64_t t = start; t < std::min(start + kBlock, positions); ++t) {
        const T* left = g + t * width + c;
        const int64_t at = starts[t] * width;
#pragma GCC unroll 2
        for (int64_t v = 0; v < vectors; ++v) {
          const V value = load<V>(left + v * lanes);
#pragma GCC unroll 4
          for (int64_t k = 0; k < taps; ++k)
            block[k][v] += value * load<V>(from[k] + at + v * lanes);
        }
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < taps; ++k) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < vectors; ++v) sums[k][v] += block[k][v];
      }
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < taps; ++k) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < vectors; ++v)
        store<V>(to + (tap + k) * width + c + v * lanes, sums[k][v]);
    }
  }

  // The sums of all channels.
  template <typename V, int64_t taps>
  PC_INLINE void sum_channels(int64_t tap, T* to) const {
    constexpr int64_t lanes = kLanesOf<V>;
    int64_t c = 0;
    for (; c + 2 * lanes <= width; c += 2 * lanes) sum<V, taps, 2>(tap, c, to);
    for (; c + lanes <= width; c += lanes) sum<V, taps, 1>(tap, c, to);
    for (; c < width; ++c) sum<One, taps, 1>(tap, c, to);
  }

 private:
  typedef T One __attribute__((vector_size(sizeof(T))));
};

// One channel in and out of each group: gradients [taps, channels first .. last] of one example.
template <typename Machine, typename T>
PC_INLINE void depthwise(const Patches<T>& patches, int64_t b, int64_t first, int64_t last, T* to) {
  using V = Vector<Machine, T>;
  const Window& window = patches.window;
  const int64_t width = last - first;
  const Buffer<T> x = patches.padded(b, first, width);
  Buffer<T> g(window.positions * width);
  patches.g.copy(b, first, width, g.data());
  const DepthwiseRows<T> rows{x.data(), g.data(), width, window.starts, window.offsets};
  int64_t tap = 0;
  for (; tap + 4 <= window.taps; tap += 4) rows.template sum_channels<V, 4>(tap, to);
  for (; tap < window.taps; ++tap) rows.template sum_channels<V, 1>(tap, to);
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

// The number of channels for whose examples the workspace has room at once.
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
  Buffer<T> along(to.direction ? all * taps : 0), weighted_sum(to.weighted_sum ? all * taps : 0);
  Buffer<T> second_moment(to.second_moment ? all * taps : 0),
      sign_sum(to.sign_sum ? all * taps : 0);
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
  inner.weighted_sum = to.weighted_sum ? weighted_sum.data() : nullptr;
  inner.second_moment = to.second_moment ? second_moment.data() : nullptr;
  inner.sign_sum = to.sign_sum ? sign_sum.data() : nullptr;
  Dense<T> dense(batch, inner);
  for (int64_t first = 0; first < all; first += step) {
    const int64_t last = std::min(first + step, all), size = (last - first) * taps;
    const Buffer<T> rows = depthwise_rows(patches, first, last);
    dense.add({rows.data(), batch, size}, first * taps, size);
  }
  dense.finish();
  if (to.weighted_sum) each([&](int64_t i, int64_t j) { to.weighted_sum[j] = weighted_sum[i]; });
  if (to.second_moment) each([&](int64_t i, int64_t j) { to.second_moment[j] = second_moment[i]; });
  if (to.sign_sum) each([&](int64_t i, int64_t j) { to.sign_sum[j] = sign_sum[i]; });
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
