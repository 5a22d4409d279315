// Kernels and launchers of embedding_gram: segments are added up, some columns at a time, then a
// block for each pair of examples takes the dot products of those whose ids both look up.
#pragma once

#include <algorithm>

#include "lookups.cuh"

namespace pc {

// Lookups of each example by itself.
template <typename scalar_t>
struct ExampleLookups {
  const int64_t* ids;     // [batch, positions], in order in each example
  const int64_t* places;  // [batch, positions], their positions, increasing among equal ids
  const scalar_t* g;      // [batch, positions, width]
  int64_t batch, positions, width;

  PC_DEVICE Lookups<scalar_t> of(int64_t b) const {
    const int64_t first = b * positions;
    return {ids + first, places + first, g + first * width, positions, positions, width};
  }
};

// A batch, with what its segments add up to in some columns, each at its first lookup.
template <typename T>
struct SegmentRows {
  const int64_t* ids;  // [batch, positions], in order in each example
  T* rows;             // [batch, positions, columns]
  int64_t batch, positions;
};

// A warp for each lookup and tile of `columns`, which begin at `first`.
template <int owned, typename scalar_t, typename T>
PC_KERNEL void gram_segments_kernel(ExampleLookups<scalar_t> in, int64_t rows, int64_t padding,
                                    int64_t first, int64_t columns, int64_t tiles, T* out) {
  const int64_t warp = thread_index() / kLanes, i = warp / tiles, tile = warp % tiles;
  if (i >= in.batch * in.positions) return;
  const int64_t b = i / in.positions, at = i - b * in.positions;
  const Lookups<scalar_t> own = in.of(b);
  const int64_t id = own.ids[at];
  expect(0 <= id && id < rows, "embedding_gram: an id is out of range");
  if (id == padding || !own.begins_run(at)) return;
  const int64_t column = (tile * kLanes + thread() % kLanes) * owned;
  each_segment<owned>(own, at, own.segment_end(at), column < columns ? first + column : in.width,
                      [&](int64_t, int64_t, const Columns<T, owned>& sum) {
                        store_columns(sum, out + i * columns, column, columns);
                      });
}

// out[b, c]: what two examples have in common in some columns, by a block for each pair; with
// `again`, added to what is there. In one batch, the lower triangle is what the upper one is.
template <int owned, typename T>
PC_KERNEL void gram_pairs_kernel(SegmentRows<T> one, SegmentRows<T> two, int64_t padding,
                                 int64_t columns, bool same, bool again, T* out) {
  const int64_t b = block() / two.batch, c = block() % two.batch;
  if (same && c < b) return;
  const int64_t start = b * one.positions, other_start = c * two.positions;
  const int64_t *ids = one.ids + start, *others = two.ids + other_start;
  const int lane = thread() % kLanes;
  double sum = 0;
  for (int64_t base = thread() - lane; base < one.positions; base += threads()) {
    const int64_t i = base + lane;
    int64_t match = 0;
    bool found = i < one.positions && ids[i] != padding && (i == 0 || ids[i - 1] != ids[i]);
    if (found) {
      match = first_of(0, two.positions, [&](int64_t j) { return others[j] >= ids[i]; });
      found = match < two.positions && others[match] == ids[i];
    }
    for (uint32_t left = ballot(found); left != 0; left &= left - 1) {
      const int from = lowest_bit(left);
      const T* row = one.rows + (start + base + from) * columns;
      const T* other = two.rows + (other_start + shuffle(match, from)) * columns;
      T dot = 0;
      for (int64_t column = lane * owned; column < columns; column += kLanes * owned) {
        const auto x = load_columns<owned>(row, column, columns);
        const auto y = load_columns<owned>(other, column, columns);
        PC_UNROLL
        for (int k = 0; k < owned; ++k) dot += x.of[k] * y.of[k];
      }
      sum += dot;
    }
  }
  sum = block_sum(sum);
  if (thread() != 0) return;
  T& to = out[b * two.batch + c];
  to = again ? static_cast<T>(to + sum) : static_cast<T>(sum);
  if (same) out[c * two.batch + b] = to;
}

// How many columns to take at a time, so that those of all lookups fit into the workspace.
template <typename T>
int64_t gram_columns(int64_t lookups, int64_t width, int64_t workspace) {
  const int64_t room = workspace / static_cast<int64_t>(sizeof(T)) / lookups / kLanes;
  return std::min(std::max<int64_t>(room, 1) * kLanes, width);
}

template <typename scalar_t, typename T>
cudaError_t launch_gram_segments(const ExampleLookups<scalar_t>& in, int64_t rows, int64_t padding,
                                 int64_t first, int64_t columns, T* out, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const auto run = [&]<int owned>() {
    const int64_t tiles = tiles_of(columns, owned);
    return launch(gram_segments_kernel<owned, scalar_t, T>,
                  blocks_of(in.batch * in.positions * tiles, kThreads), kThreads, 0, stream, in,
                  rows, padding, first, columns, tiles, out);
  };
  return takes_wide<T>(in.g, in.width) ? run.template operator()<kWide<T>>()
                                       : run.template operator()<1>();
}

template <typename T>
cudaError_t launch_gram_pairs(const SegmentRows<T>& one, const SegmentRows<T>& two, int64_t padding,
                              int64_t columns, bool again, T* out, cudaStream_t stream) {
  constexpr int64_t kMostWarps = 8;
  const int64_t warps = std::min((one.positions + kLanes - 1) / kLanes, kMostWarps);
  const bool same = one.rows == two.rows;
  const auto run = [&]<int owned>() {
    return launch(gram_pairs_kernel<owned, T>, one.batch * two.batch,
                  static_cast<int>(warps) * kLanes, warps * sizeof(double), stream, one, two,
                  padding, columns, same, again, out);
  };
  return takes_wide<T>(one.rows, columns) && takes_wide<T>(two.rows, columns)
             ? run.template operator()<kWide<T>>()
             : run.template operator()<1>();
}

// rows: of the table. No size is zero. sums: [lookups of one, and of two unless it is null, as one
// is then taken with itself; columns]; out: [B1, B2].
template <typename scalar_t, typename T>
cudaError_t launch_embedding_gram(const ExampleLookups<scalar_t>& one,
                                  const ExampleLookups<scalar_t>* two, int64_t rows,
                                  int64_t padding, int64_t columns, T* sums, T* out,
                                  cudaStream_t stream) {
  const SegmentRows<T> first = {one.ids, sums, one.batch, one.positions};
  SegmentRows<T> second = first;
  for (int64_t start = 0; start < one.width; start += columns) {
    const int64_t size = std::min(columns, one.width - start);
    cudaError_t status = launch_gram_segments(one, rows, padding, start, size, sums, stream);
    if (status == cudaSuccess && two != nullptr) {
      second = {two->ids, sums + one.batch * one.positions * size, two->batch, two->positions};
      status = launch_gram_segments(*two, rows, padding, start, size, second.rows, stream);
    }
    if (status == cudaSuccess) {
      status = launch_gram_pairs(first, second, padding, size, start > 0, out, stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace pc
