// The tile engine: per-example gradients G_b = sum_t g_bt x_bt^T, tile by tile in registers. Each
// tile is reduced as soon as its example ends, so no G_b is ever stored. If all examples must
// meet, the rows of one tile are, [B, tile].
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "order.h"
#include "packed.h"
#include "panels.h"
#include "reduction.h"
#include "tile.h"
#include "workspace.h"

namespace pc {

// The state that all tiles share. A part is a range of the segments of one tile. Lanes are tasks:
// lane i takes parts i, i + lanes, ... and has partial sums [B], or [B, B], of its own. The numbers
// of all these depend on shapes alone, never on threads.
template <typename T, typename Source>
struct Job {
  Job(const Source& source, const Reduction<T>& to)
      : source(source), to(to), grid(source.out, source.in, area(), sides(), 1) {
    // Ranges share a tile's factors but not its outputs, and smaller tiles the other way round.
    const int64_t tiles = source.groups * grid.tiles();
    const int64_t longest = source.segments * source.most_positions() / 512;
    if (!to.meet()) ranges = std::clamp<int64_t>(enough / tiles, 1, std::max<int64_t>(longest, 1));
    ranges = std::min(ranges, source.segments);
    const int64_t wanted = (enough / 2 + source.groups * ranges - 1) / (source.groups * ranges);
    grid = Grid<T>(source.out, source.in, area(), sides(), wanted);
    parts = source.groups * grid.tiles() * ranges;
    const int64_t batch = source.segments, size = source.groups * source.out * source.in;
    const int64_t partial = workspace() / 8 / (3 * batch * int64_t{sizeof(double)});
    lanes = std::clamp<int64_t>(partial, 1, std::min<int64_t>(parts, 256));
    if (to.gram) {
      const int64_t room = workspace() / 2 / (source.gram_size() * int64_t{sizeof(T)});
      lanes = std::clamp<int64_t>(room, 1, std::min<int64_t>(lanes, 64));
      gram.assign(lanes * source.gram_size(), T{0});
    }
    if (to.sq_norms) sq_norms.assign(lanes * batch, 0);
    if (to.dots) dots.assign(lanes * batch, 0);
    if (to.sum_dots) sum_dots.assign(lanes * batch, 0);
    if (to.weighted_sum) weighted_sums.resize((ranges - 1) * size);
    if (to.second_moment) second_moments.resize((ranges - 1) * size);
    if (to.sign_sum) sign_sums.resize((ranges - 1) * size);
  }

  // The largest tile that the L2 cache holds, with the rows of all examples, or with the outputs
  // and the direction.
  int64_t area() const {
    constexpr int64_t cached = (512 << 10) / sizeof(T);
    const int64_t outputs = !!to.direction + !!to.weighted_sum + !!to.second_moment + !!to.sign_sum;
    const int64_t copies = (to.meet() ? source.segments : 0) + std::max<int64_t>(outputs, 1);
    return cached / copies;
  }

  // The sides of a tile whose factors there is room for.
  int64_t sides() const { return workspace() / 16 / int64_t{sizeof(T)} / source.most_positions(); }

  // The place of a range of some group in an output: the first one uses the output itself.
  T* at(T* output, Buffer<T>& others, int64_t range, int64_t group) const {
    if (output == nullptr) return nullptr;
    const int64_t size = source.out * source.in;
    T* all = range == 0 ? output : others.data() + (range - 1) * source.groups * size;
    return all + group * size;
  }

  static constexpr int64_t enough = 16;

  const Source& source;
  const Reduction<T>& to;
  Grid<T> grid;
  int64_t ranges = 1, parts, lanes;
  Buffer<double> sq_norms, dots, sum_dots;
  Buffer<T> gram, weighted_sums, second_moments, sign_sums;
};

// Adds <a_i, b_j> to gram; if b is a only where j >= i, and below in its blocks.
template <typename Machine, typename T>
PC_INLINE void add_gram(const Rows<T>& a, const Rows<T>& b, int64_t size, bool same, T* gram) {
  constexpr int64_t block = 16;
  for (int64_t i = 0; i < a.count; i += block) {
    const int64_t j = same ? i : 0;
    const Rows<T> some{a(i), std::min(block, a.count - i), a.stride};
    const Rows<T> others{b(j), b.count - j, b.stride};
    T* to = gram + i * b.count + j;
    dot_rows<Machine, T>(some, others, size, [&](int64_t r, int64_t c, T value) PC_INLINED {
      to[r * b.count + c] += value;
    });
  }
}

// The aggregate in a tile, from its padded rows.
template <typename T, typename Source>
void aggregate(const Job<T, Source>& job, const Rows<T>& rows, const Tile<T>& tile, T* parameter) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Rows<T> columns{rows.data + r * tile.width, rows.count, rows.stride};
    order_columns(columns, tile.used, job.to.coef, *job.to.order,
                  parameter + (tile.first_out + r) * tile.in + tile.first_in);
  }
}

// The outputs that need all examples of a tile, `rows` [B, size].
template <typename Machine, typename T, typename Source>
PC_INLINE void meet(Job<T, Source>& job, const Rows<T>& rows, int64_t size, int64_t lane) {
  if (job.to.gram) {
    const Source& source = job.source;
    const Rows<T> one{rows.data, source.split, rows.stride};
    const Rows<T> two{rows(source.split), rows.count - source.split, rows.stride};
    add_gram<Machine>(one, source.cross() ? two : one, size, !source.cross(),
                      job.gram.data() + lane * source.gram_size());
  }
  if (job.to.sum_dots) {
    Buffer<T> sum(size, T{0}), block(size);
    for (int64_t first = 0; first < rows.count; first += kBlock) {
      std::fill(block.begin(), block.end(), T{0});
      for (int64_t b = first; b < std::min(first + kBlock, rows.count); ++b) {
        const T coef = job.to.coef ? job.to.coef[b] : T{1};
        const T* row = rows(b);
        if (coef == 0) continue;
        for (int64_t i = 0; i < size; ++i) block[i] += coef * row[i];
      }
      for (int64_t i = 0; i < size; ++i) sum[i] += block[i];
    }
    for (int64_t b = 0; b < rows.count; ++b) {
      job.sum_dots[lane * rows.count + b] +=
          dot<Machine>(rows(b), static_cast<const T*>(sum.data()), size);
    }
  }
}

// One tile, from what is packed or packing for itself.
template <typename Machine, typename T, typename Source>
PC_INLINE void reduce_tile(Job<T, Source>& job, const Packed<T, Source>* packed, int64_t part,
                           int64_t lane) {
  const Source& source = job.source;
  const int64_t segments = source.segments, tiles = job.grid.tiles();
  const int64_t range = part % job.ranges, group = part / job.ranges / tiles;
  const int64_t first = range * segments / job.ranges;
  const int64_t last = (range + 1) * segments / job.ranges;
  const Tile<T> tile(job.grid, part / job.ranges % tiles);
  const TileInput<T> direction(
      tile, job.to.direction ? job.to.direction + group * source.out * source.in : nullptr);
  TileOutput<T> weighted_sum(tile, job.at(job.to.weighted_sum, job.weighted_sums, range, group),
                             last - first);
  TileOutput<T> second_moment(tile, job.at(job.to.second_moment, job.second_moments, range, group),
                              last - first);
  TileOutput<T> sign_sum(tile, job.at(job.to.sign_sum, job.sign_sums, range, group), last - first);
  // A step that is no power of two keeps the rows from the same lines of the cache.
  const int64_t size = tile.rows * tile.width, step = size + kLanes<T>;
  Buffer<T> rows(job.to.meet() ? segments * step : 0), own_x, own_g;
  for (int64_t s = first; s < last; ++s) {
    const int64_t positions = source.positions(s);
    if (packed == nullptr) {
      own_x.resize(tile.width * positions);
      own_g.resize(round_up(tile.rows, kPanel) * positions);
      source.pack_x(group, s, tile.first_in, tile.used, own_x.data());
      source.pack_g(group, s, tile.first_out, tile.rows, own_g.data());
    }
    const T* x = packed ? packed->x(group, s, tile.first_in) : own_x.data();
    const T* g = packed ? packed->g(group, s, tile.first_out) : own_g.data();
    Epilogue<Machine, T> epilogue{job.to.coef ? job.to.coef[s] : T{1}, (s - first) % kBlock == 0,
                                  job.to.sq_norms != nullptr};
    for (int64_t i = 0; i < tile.used; i += kLanes<T>) {
      epilogue.direction = direction.place(i);
      epilogue.weighted_sum = weighted_sum.place(i);
      epilogue.second_moment = second_moment.place(i);
      epilogue.sign_sum = sign_sum.place(i);
      if (!rows.empty()) epilogue.row = {rows.data() + s * step + i, tile.width};
      const bool only_sum = epilogue.only_sum();
      for (int64_t o = 0; o < tile.rows; o += kPanel) {
        const T *panel_x = x + i * positions, *panel_g = g + o * positions;
        if (only_sum && o + kPanel <= tile.rows && i + kLanes<T> <= tile.used) {
          multiply_panels<Machine>(panel_x, panel_g, positions, epilogue.fresh,
                                   [&](int64_t r)
                                       PC_INLINED { return epilogue.weighted_sum.at(o + r); });
          continue;
        }
        alignas(64) T values[kPanel * kLanes<T>];
        multiply_panels<Machine>(panel_x, panel_g, positions, true,
                                 [&](int64_t r) PC_INLINED { return values + r * kLanes<T>; });
        // Padding times an infinite factor is not zero.
        for (int64_t past = tile.used - i; past < kLanes<T>; ++past) {
          for (int64_t r = 0; r < kPanel; ++r) values[r * kLanes<T> + past] = 0;
        }
        epilogue(values, o, std::min(kPanel, tile.rows - o));
      }
    }
    if (job.to.sq_norms) job.sq_norms[lane * segments + s] += total(epilogue.sq_norms);
    if (job.to.dots) job.dots[lane * segments + s] += total(epilogue.dots);
    if ((s - first) % kBlock == kBlock - 1 || s == last - 1) {
      const bool block = s - first < kBlock;
      weighted_sum.flush(block);
      second_moment.flush(block);
      sign_sum.flush(block);
    }
  }
  if (job.to.meet()) {
    const Rows<T> all{rows.data(), segments, step};
    meet<Machine>(job, all, size, lane);
    if (job.to.aggregate) {
      aggregate(job, all, tile, job.to.aggregate + group * source.out * source.in);
    }
  }
}

// Adds what other ranges have found to an output.
template <typename T>
void add_ranges(const Buffer<T>& others, int64_t size, T* output) {
  if (others.empty()) return;
  const int64_t count = static_cast<int64_t>(others.size()) / size;
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t range = 0; range < count; ++range) {
      for (int64_t i = begin; i < end; ++i) output[i] += others[range * size + i];
    }
  });
}

template <typename T, typename Source>
void run_engine(const Source& one, const Reduction<T>& to, const Source* two = nullptr);

// Dots with the sum of examples that are too many to meet in the workspace: the sum comes
// first.
template <typename T, typename Source>
void run_twice(const Source& source, const Reduction<T>& to) {
  Reduction<T> first = to, second;
  Buffer<T> own(to.weighted_sum ? 0 : source.groups * source.out * source.in);
  first.sum_dots = nullptr;
  if (!to.weighted_sum) first.weighted_sum = own.data();
  run_engine(source, first);
  second.direction = first.weighted_sum;
  second.dots = to.sum_dots;
  run_engine(source, second);
}

// Writes all outputs of `to`. Factors that are small, or that several tiles would pack again, are
// packed once if there is room; otherwise tiles pack for themselves, which the cache likes better.
// With a second batch `to` may want nothing but the Gram [B1, B2].
template <typename T, typename Source>
void run_engine(const Source& one, const Reduction<T>& to, const Source* two) {
  const int64_t meeting = one.segments * (kPanel + 1) * kLanes<T> * int64_t{sizeof(T)};
  if (to.sum_dots && !to.gram && meeting > workspace() / 4) return run_twice(one, to);
  const Batches<Source> source(one, two);
  Job<T, Batches<Source>> job(source, to);
  Packed<T, Batches<Source>> packed(source);
  const int64_t sides = job.grid.tiles() * (job.grid.height + job.grid.width);
  const int64_t room = workspace() / 2, little = std::min(room, int64_t{4} << 20);
  const bool once = packed.bytes() <= (2 * sides > 3 * (source.in + source.out) ? room : little);
  if (once) packed.pack();
  torch::stable::parallel_for(0, job.lanes, 1, [&](int64_t begin, int64_t end) {
    vectorized([&](auto machine) PC_INLINED {
      for (int64_t lane = begin; lane < end; ++lane) {
        for (int64_t part = lane; part < job.parts; part += job.lanes) {
          reduce_tile<decltype(machine)>(job, once ? &packed : nullptr, part, lane);
        }
      }
    });
  });
  const int64_t segments = source.segments, size = source.groups * source.out * source.in;
  add_ranges(job.weighted_sums, size, to.weighted_sum);
  add_ranges(job.second_moments, size, to.second_moment);
  add_ranges(job.sign_sums, size, to.sign_sum);
  if (to.sq_norms) sum_parts(job.sq_norms, job.lanes, to.sq_norms, segments);
  if (to.dots) sum_parts(job.dots, job.lanes, to.dots, segments);
  if (to.sum_dots) sum_parts(job.sum_dots, job.lanes, to.sum_dots, segments);
  if (to.gram) {
    sum_parts(job.gram, job.lanes, to.gram, source.gram_size());
    if (!source.cross()) mirror(to.gram, segments);
  }
}

}  // namespace pc
