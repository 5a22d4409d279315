// Kernels and launcher of embedding_reduce. A warp takes a run of lookups, or a segment where
// examples need not meet, in some columns; a long run is shared out among the warps of a block.
#pragma once

#include <algorithm>

#include "lookups.cuh"

namespace pc {

// Lookups that one warp takes of a run, and warps that take the longer ones.
constexpr int kShortRun = 64, kLongWarps = 8;

// The outputs for V rows of a table and B examples; null where not wanted. In kernels, outputs per
// example are per lookup: a number for each tile of columns [tiles, B * T], of a segment at its
// first place, zero at the others.
template <typename T>
struct TableReduction {
  int64_t rows, padding;  // V, and the row without a gradient or -1
  const T* coef;          // [B]
  const T* direction;     // [V, D]
  T* sq_norms;            // [B]
  T* dots;                // [B]
  T* weighted_sum;        // [V, D], zeros in rows that are not looked up, as the next two
  T* second_moment;       // [V, D]
  T* sign_sum;            // [V, D]
  T* sum_dots;            // [B]

  // Whether examples meet in the rows of the table.
  bool meet() const { return weighted_sum || second_moment || sign_sum || sum_dots; }
  bool any() const { return meet() || sq_norms || dots; }

  int64_t per_example() const {
    return (sq_norms != nullptr) + (dots != nullptr) + (sum_dots != nullptr);
  }
};

// Sums over examples of a row of the table.
template <typename T, int owned>
struct Totals {
  Blocked<T> weighted_sum[owned], second_moment[owned], sign_sum[owned];
  int64_t count;

  PC_DEVICE void add(const Columns<T, owned>& one, T coef) {
    PC_UNROLL
    for (int c = 0; c < owned; ++c) {
      const T value = one.of[c];
      weighted_sum[c].add(count, coef == 0 ? T(0) : coef * value);
      second_moment[c].add(count, value * value);
      sign_sum[c].add(count, value != value ? value : T(value > 0) - T(value < 0));
    }
    ++count;
  }
};

// The dot products of segments with themselves and with the direction.
template <typename T, int owned>
PC_DEVICE void reduce_segment(const TableReduction<T>& to, const Columns<T, owned>& sum,
                              const Columns<T, owned>& direction, int64_t part) {
  const T sq_norm = to.sq_norms ? warp_dot(sum, sum) : T(0);
  const T dot = to.dots ? warp_dot(sum, direction) : T(0);
  if (thread() % kLanes != 0) return;
  if (to.sq_norms) to.sq_norms[part] = sq_norm;
  if (to.dots) to.dots[part] = dot;
}

// Adds up a run, or a part of it.
template <int owned, typename scalar_t, typename T>
PC_DEVICE void reduce_part(const Lookups<scalar_t>& in, const TableReduction<T>& to, int64_t id,
                           int64_t begin, int64_t end, int64_t tile, Totals<T, owned>& totals) {
  const int64_t column = (tile * kLanes + thread() % kLanes) * owned;
  Columns<T, owned> direction = {};
  if (to.dots) direction = load_columns<owned>(to.direction + id * in.width, column, in.width);
  each_segment<owned>(in, begin, end, column,
                      [&](int64_t place, int64_t b, const Columns<T, owned>& sum) {
                        reduce_segment(to, sum, direction, tile * in.count + place);
                        totals.add(sum, to.coef ? to.coef[b] : T(1));
                      });
}

// The dot products of the examples of a run, or of a part of it, with its finished row.
template <int owned, typename scalar_t, typename T>
PC_DEVICE void dot_part(const Lookups<scalar_t>& in, const TableReduction<T>& to, int64_t begin,
                        int64_t end, int64_t tile, const Columns<T, owned>& row) {
  const int64_t column = (tile * kLanes + thread() % kLanes) * owned;
  each_segment<owned>(in, begin, end, column,
                      [&](int64_t place, int64_t, const Columns<T, owned>& sum) {
                        const T dot = warp_dot(sum, row);
                        if (thread() % kLanes == 0) to.sum_dots[tile * in.count + place] = dot;
                      });
}

// The row of a table from sums(c) of its columns; what comes out is in all lanes.
template <int owned, typename T, typename Sums>
PC_DEVICE Columns<T, owned> finish_row(T* table, int64_t id, int64_t tile, int64_t width,
                                       const Sums& sums) {
  const int64_t column = (tile * kLanes + thread() % kLanes) * owned;
  Columns<T, owned> row;
  PC_UNROLL
  for (int c = 0; c < owned; ++c) row.of[c] = sums(c);
  if (table != nullptr) store_columns(row, table + id * width, column, width);
  return row;
}

// A warp for each lookup and tile.
template <int owned, typename scalar_t, typename T>
PC_KERNEL void embedding_segments_kernel(Lookups<scalar_t> in, TableReduction<T> to,
                                         int64_t tiles) {
  const int64_t warp = thread_index() / kLanes, i = warp / tiles, tile = warp % tiles;
  if (i >= in.count) return;
  const int64_t id = in.ids[i];
  expect(0 <= id && id < to.rows, "embedding_reduce: an id is out of range");
  if (id == to.padding || !in.begins_segment(i)) return;
  const int64_t column = (tile * kLanes + thread() % kLanes) * owned;
  Columns<T, owned> direction = {};
  if (to.dots) direction = load_columns<owned>(to.direction + id * in.width, column, in.width);
  each_segment<owned>(in, i, in.segment_end(i), column,
                      [&](int64_t place, int64_t, const Columns<T, owned>& sum) {
                        reduce_segment(to, sum, direction, tile * in.count + place);
                      });
}

// A warp for each lookup and tile.
template <int owned, typename scalar_t, typename T>
PC_KERNEL void embedding_runs_kernel(Lookups<scalar_t> in, TableReduction<T> to, int64_t tiles) {
  const int64_t warp = thread_index() / kLanes, i = warp / tiles, tile = warp % tiles;
  if (i >= in.count) return;
  const int64_t id = in.ids[i];
  expect(0 <= id && id < to.rows, "embedding_reduce: an id is out of range");
  if (id == to.padding || !in.begins_run(i)) return;
  if (i + kShortRun < in.count && in.ids[i + kShortRun] == id) return;
  const int64_t end = in.run_end(i);
  Totals<T, owned> totals = {};
  reduce_part<owned>(in, to, id, i, end, tile, totals);
  const auto finish = [&](T* table, const Blocked<T>(&sums)[owned]) {
    return finish_row<owned>(table, id, tile, in.width,
                             [&](int c) { return sums[c].get(totals.count); });
  };
  const Columns<T, owned> row = finish(to.weighted_sum, totals.weighted_sum);
  if (to.second_moment) finish(to.second_moment, totals.second_moment);
  if (to.sign_sum) finish(to.sign_sum, totals.sign_sum);
  if (to.sum_dots) dot_part<owned>(in, to, i, end, tile, row);
}

// The first lookup from i on that begins a segment, in a run that ends at `end` and began before.
template <typename scalar_t>
PC_DEVICE int64_t next_segment(const Lookups<scalar_t>& in, int64_t i, int64_t end) {
  const int64_t limit = (in.example(i - 1) + 1) * in.positions;
  return first_of(i, end, [&](int64_t j) { return in.place(j) >= limit; });
}

// A block for every kShortRun lookups and tile takes the long run that they are the first multiple
// of kShortRun in. Shared memory: [3, kLongWarps, kLanes * owned].
template <int owned, typename scalar_t, typename T>
PC_KERNEL void embedding_long_runs_kernel(Lookups<scalar_t> in, TableReduction<T> to,
                                          int64_t tiles) {
  const int64_t at = block() / tiles * kShortRun, tile = block() % tiles, id = in.ids[at];
  if (id == to.padding || (at > 0 && in.ids[at - kShortRun] == id)) return;
  const int64_t begin =
      first_of(at < kShortRun ? 0 : at - kShortRun, at, [&](int64_t j) { return in.ids[j] == id; });
  const int64_t end = first_of(at, in.count, [&](int64_t j) { return in.ids[j] != id; });
  if (end - begin <= kShortRun) return;
  const int warp = thread() / kLanes, lane = thread() % kLanes;
  const auto border = [&](int part) {
    const int64_t place = begin + (end - begin) * part / kLongWarps;
    return part == 0 ? begin : next_segment(in, place, end);
  };
  const int64_t first = border(warp), last = border(warp + 1);
  Totals<T, owned> totals = {};
  reduce_part<owned>(in, to, id, first, last, tile, totals);
  constexpr int kSize = kLanes * owned;
  auto* shared = shared_memory<double>();
  PC_UNROLL
  for (int c = 0; c < owned; ++c) {
    double* own = shared + warp * kSize + lane * owned + c;
    own[0] = totals.weighted_sum[c].total + totals.weighted_sum[c].block;
    own[kLongWarps * kSize] = totals.second_moment[c].total + totals.second_moment[c].block;
    own[2 * kLongWarps * kSize] = totals.sign_sum[c].total + totals.sign_sum[c].block;
  }
  sync();
  const auto finish = [&](T* table, int kind) {
    const double* parts = shared + kind * kLongWarps * kSize + lane * owned;
    return finish_row<owned>(table, id, tile, in.width, [&](int c) {
      double sum = 0;
      for (int part = 0; part < kLongWarps; ++part) sum += parts[part * kSize + c];
      return static_cast<T>(sum);
    });
  };
  if (warp == 1 && to.second_moment) finish(to.second_moment, 1);
  if (warp == 2 && to.sign_sum) finish(to.sign_sum, 2);
  const Columns<T, owned> row = finish(warp == 0 ? to.weighted_sum : nullptr, 0);
  if (to.sum_dots) dot_part<owned>(in, to, first, last, tile, row);
}

// out[b]: the sum of what a block's example has in parts [tiles, batch * positions].
template <typename T>
PC_KERNEL void embedding_examples_kernel(const T* parts, T* out, int64_t tiles, int64_t positions) {
  double sum = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const T* own = parts + (tile * blocks() + block()) * positions;
    for (int64_t t = thread(); t < positions; t += threads()) sum += own[t];
  }
  sum = block_sum(sum);
  if (thread() == 0) out[block()] = static_cast<T>(sum);
}

// Columns that a lane takes.
template <typename scalar_t, typename T>
int columns_of_lane(const Lookups<scalar_t>& in, const TableReduction<T>& to) {
  return takes_wide<T>(in.g, in.width) && takes_wide<T>(to.direction, in.width) ? kWide<T> : 1;
}

// How many `parts` a launch needs.
template <typename scalar_t, typename T>
int64_t parts_of(const Lookups<scalar_t>& in, const TableReduction<T>& to) {
  return to.per_example() * tiles_of(in.width, columns_of_lane(in, to)) * in.count;
}

template <int owned, typename scalar_t, typename T>
cudaError_t launch_runs(const Lookups<scalar_t>& in, const TableReduction<T>& to,
                        cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t tiles = tiles_of(in.width, owned), blocks = blocks_of(in.count * tiles, kThreads);
  if (!to.meet()) {
    return launch(embedding_segments_kernel<owned, scalar_t, T>, blocks, kThreads, 0, stream, in,
                  to, tiles);
  }
  const cudaError_t status =
      launch(embedding_runs_kernel<owned, scalar_t, T>, blocks, kThreads, 0, stream, in, to, tiles);
  if (status != cudaSuccess || in.count <= kShortRun) return status;
  constexpr int kShared = 3 * kLongWarps * kLanes * owned * sizeof(double);
  return launch(embedding_long_runs_kernel<owned, scalar_t, T>,
                (in.count + kShortRun - 1) / kShortRun * tiles, kLongWarps * kLanes, kShared,
                stream, in, to, tiles);
}

// Whether ids may come in any order.
template <typename T>
bool needs_no_order(const TableReduction<T>& to, int64_t positions) {
  return !to.meet() && (positions == 1 || to.sq_norms == nullptr);
}

// Without `gram`. No size is zero; parts: [parts_of], zeros.
template <typename scalar_t, typename T>
cudaError_t launch_embedding_reduce(Lookups<scalar_t> in, const TableReduction<T>& to, T* parts,
                                    cudaStream_t stream) {
  const int owned = columns_of_lane(in, to);
  const int64_t tiles = tiles_of(in.width, owned), positions = in.positions;
  TableReduction<T> part = to;
  for (T** each : {&part.sq_norms, &part.dots, &part.sum_dots}) {
    if (*each == nullptr) continue;
    *each = parts;
    parts += tiles * in.count;
  }
  // A lookup is then a segment by itself.
  if (in.places == nullptr) in.positions = 1;
  cudaError_t status =
      owned == 1 ? launch_runs<1>(in, part, stream) : launch_runs<kWide<T>>(in, part, stream);
  const auto add_up = [&](const T* from, T* out) {
    if (status != cudaSuccess || out == nullptr) return;
    const int threads = tiles * positions > 1024 ? 256 : kLanes;
    status = launch(embedding_examples_kernel<T>, in.count / positions, threads,
                    threads / kLanes * sizeof(double), stream, from, out, tiles, positions);
  };
  add_up(part.sq_norms, to.sq_norms);
  add_up(part.dots, to.dots);
  add_up(part.sum_dots, to.sum_dots);
  return status;
}

}  // namespace pc
