// linear_reduce on the CPU. Its schema and its truth: pycoherence/ops/linear_reduce.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "tile_engine.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

enum Want : int64_t { kSqNorms = 1, kDots = 2, kSum = 4, kMoment = 8, kSign = 16 };

PC_CLONES void reduce_tile_float(const pc::Factors<float>& factors, const pc::Grid<float>& grid,
                                 int64_t tile, const pc::Reduction<float>& to) {
  pc::reduce_tile(factors, grid, tile, to);
}

PC_CLONES void reduce_tile_double(const pc::Factors<double>& factors, const pc::Grid<double>& grid,
                                  int64_t tile, const pc::Reduction<double>& to) {
  pc::reduce_tile(factors, grid, tile, to);
}

void reduce_tile(const pc::Factors<float>& factors, const pc::Grid<float>& grid, int64_t tile,
                 const pc::Reduction<float>& to) {
  reduce_tile_float(factors, grid, tile, to);
}

void reduce_tile(const pc::Factors<double>& factors, const pc::Grid<double>& grid, int64_t tile,
                 const pc::Reduction<double>& to) {
  reduce_tile_double(factors, grid, tile, to);
}

// Sums partials [S, tiles] over tiles, in double and in order.
template <typename T>
void sum_tiles(const std::vector<T>& partials, int64_t tiles, T* out, int64_t segments) {
  for (int64_t s = 0; s < segments; ++s) {
    double total = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) total += partials[s * tiles + tile];
    out[s] = static_cast<T>(total);
  }
}

template <typename T>
void run_engine(const pc::Factors<T>& factors, pc::Reduction<T> to) {
  const pc::Grid<T> grid(factors.out, factors.in);
  const int64_t segments = factors.segments(), partials = segments * grid.tiles();
  T* const sq_norms = to.sq_norms;
  T* const dots = to.dots;
  std::vector<T> sq_norm_parts(sq_norms ? partials : 0), dot_parts(dots ? partials : 0);
  if (sq_norms) to.sq_norms = sq_norm_parts.data();
  if (dots) to.dots = dot_parts.data();
  torch::stable::parallel_for(0, grid.tiles(), 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) reduce_tile(factors, grid, tile, to);
  });
  if (sq_norms) sum_tiles(sq_norm_parts, grid.tiles(), sq_norms, segments);
  if (dots) sum_tiles(dot_parts, grid.tiles(), dots, segments);
}

// With one position an example's gradient is g_b x_b^T, and its norm the product of theirs.
template <typename T>
void rank_one_sq_norms(const pc::Factors<T>& factors, T* sq_norms) {
  const auto sq_norm = [](const T* row, int64_t size) {
    double total = 0;
    for (int64_t i = 0; i < size; ++i) total += static_cast<double>(row[i]) * row[i];
    return total;
  };
  torch::stable::parallel_for(0, factors.segments(), 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      sq_norms[b] = static_cast<T>(sq_norm(factors.x + b * factors.in, factors.in) *
                                   sq_norm(factors.g + b * factors.out, factors.out));
    }
  });
}

// sum_b coef_b G_b needs no example boundaries: scale the rows of g, leave out those of no weight,
// and cut the rest into segments whose inputs stay in the L2 cache.
template <typename T>
void weighted_sum(const pc::Factors<T>& factors, const T* coef, T* sum) {
  std::vector<T> x, g;
  pc::Factors<T> all{factors.x, factors.g, factors.in, factors.out, {}};
  int64_t rows = factors.starts.back();
  if (coef != nullptr) {
    for (int64_t b = 0; b < factors.segments(); ++b) {
      if (coef[b] == 0) continue;
      const int64_t first = factors.starts[b], last = factors.starts[b + 1];
      x.insert(x.end(), factors.x + first * factors.in, factors.x + last * factors.in);
      for (int64_t i = first * factors.out; i < last * factors.out; ++i) {
        g.push_back(coef[b] * factors.g[i]);
      }
    }
    rows = factors.in > 0 ? static_cast<int64_t>(x.size()) / factors.in : 0;
    all.x = x.data();
    all.g = g.data();
  }
  for (int64_t row = 0; row < rows; row += pc::kBlock) all.starts.push_back(row);
  all.starts.push_back(rows);
  pc::Reduction<T> to;
  to.sum = sum;
  run_engine(all, to);
}

template <typename T>
void reduce(const pc::Factors<T>& factors, const pc::Reduction<T>& to, bool rank_one) {
  const bool boundaries = to.dots || to.moment || to.sign || (to.sq_norms && !rank_one);
  if (boundaries) {
    run_engine(factors, to);
    return;
  }
  if (to.sq_norms) rank_one_sq_norms(factors, to.sq_norms);
  if (to.sum) weighted_sum(factors, to.coef, to.sum);
}

Tensor prepare(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

template <typename T>
Outputs linear_reduce(const Tensor& x, const Tensor& g, const std::optional<Tensor>& coef,
                      const std::optional<Tensor>& direction, int64_t want, ScalarType dtype) {
  const int64_t batch = x.size(0), positions = x.size(1), in = x.size(2), out = g.size(2);
  const auto output = [&](int64_t flag, std::vector<int64_t> size) {
    return want & flag ? torch::stable::new_zeros(g, size, dtype)
                       : torch::stable::new_empty(g, std::vector<int64_t>{0});
  };
  const Tensor sq_norms = output(kSqNorms, {batch}), dots = output(kDots, {batch}),
               sum = output(kSum, {out, in}), moment = output(kMoment, {out, in}),
               sign = output(kSign, {out, in});
  if (std::min({batch, positions, in, out}) > 0) {
    const Tensor x_rows = prepare(x, dtype), g_rows = prepare(g, dtype);
    std::optional<Tensor> weights, along;
    if (coef) weights = prepare(*coef, dtype);
    if (direction) along = prepare(*direction, dtype);
    const auto read = [](const Tensor& from) { return from.const_data_ptr<T>(); };
    const auto write = [&](const Tensor& to, int64_t flag) {
      return want & flag ? to.mutable_data_ptr<T>() : nullptr;
    };
    pc::Factors<T> factors{read(x_rows), read(g_rows), in, out, {}};
    for (int64_t b = 0; b <= batch; ++b) factors.starts.push_back(b * positions);
    reduce<T>(factors,
              {weights ? read(*weights) : nullptr, along ? read(*along) : nullptr,
               write(sq_norms, kSqNorms), write(dots, kDots), write(sum, kSum),
               write(moment, kMoment), write(sign, kSign)},
              positions == 1);
  }
  return {sq_norms, dots, sum, moment, sign};
}

Outputs linear_reduce_cpu(const Tensor& x, const Tensor& g, const std::optional<Tensor>& coef,
                          const std::optional<Tensor>& direction, int64_t want) {
  return x.scalar_type() == ScalarType::Double
             ? linear_reduce<double>(x, g, coef, direction, want, ScalarType::Double)
             : linear_reduce<float>(x, g, coef, direction, want, ScalarType::Float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("linear_reduce", TORCH_BOX(&linear_reduce_cpu));
}
