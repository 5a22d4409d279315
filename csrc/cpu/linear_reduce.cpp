// linear_reduce on the CPU. Its schema and its truth: pycoherence/ops/linear_reduce.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "reduce_op.h"
#include "tile_engine.h"

namespace {

using pc::Outputs;
using pc::Tensor;

// Rows of x [rows, I] and g [rows, O]; `length` of them make a segment, the last one may have less.
template <typename T>
struct Rows {
  const T* x;
  const T* g;
  int64_t in, out;
  int64_t rows, length;
  int64_t segments = (rows + length - 1) / length;

  int64_t positions(int64_t s) const { return std::min(length, rows - s * length); }

  PC_INLINE void pack_x(int64_t s, int64_t first, int64_t used, T* to) const {
    pc::pack_columns<pc::kLanes<T>>(x + s * length * in + first, in, used, positions(s), to);
  }

  PC_INLINE void pack_g(int64_t s, int64_t first, int64_t used, T* to) const {
    pc::pack_columns<pc::kPanel>(g + s * length * out + first, out, used, positions(s), to);
  }
};

PC_CLONES void run_tile(const Rows<float>& rows, const pc::Grid<float>& grid, int64_t tile,
                        const pc::Reduction<float>& to, int64_t part, int64_t parts) {
  pc::reduce_tile(rows, grid, tile, to, part, parts);
}

PC_CLONES void run_tile(const Rows<double>& rows, const pc::Grid<double>& grid, int64_t tile,
                        const pc::Reduction<double>& to, int64_t part, int64_t parts) {
  pc::reduce_tile(rows, grid, tile, to, part, parts);
}

template <typename T>
void run(const Rows<T>& rows, const pc::Reduction<T>& to) {
  const pc::Grid<T> grid(rows.out, rows.in);
  pc::run_engine(1, rows.segments, grid, to,
                 [&](int64_t, auto&&... tile) { run_tile(rows, tile...); });
}

// With one position an example's gradient is g_b x_b^T, and its norm the product of theirs.
template <typename T>
void rank_one_sq_norms(const Rows<T>& rows, T* sq_norms) {
  torch::stable::parallel_for(0, rows.rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      sq_norms[b] = static_cast<T>(pc::sq_norm(rows.x + b * rows.in, rows.in) *
                                   pc::sq_norm(rows.g + b * rows.out, rows.out));
    }
  });
}

// sum_b coef_b G_b needs no example boundaries: scale the rows of g, leave out those of no weight,
// and cut the rest into segments whose inputs stay in the L2 cache.
template <typename T>
void weighted_sum(const Rows<T>& rows, const T* coef, T* sum) {
  std::vector<T> x, g;
  Rows<T> all{rows.x, rows.g, rows.in, rows.out, rows.rows, pc::kBlock};
  if (coef != nullptr) {
    for (int64_t row = 0; row < rows.rows; ++row) {
      const T weight = coef[row / rows.length];
      if (weight == 0) continue;
      x.insert(x.end(), rows.x + row * rows.in, rows.x + (row + 1) * rows.in);
      for (int64_t o = 0; o < rows.out; ++o) g.push_back(weight * rows.g[row * rows.out + o]);
    }
    const int64_t kept = static_cast<int64_t>(g.size()) / rows.out;
    all = {x.data(), g.data(), rows.in, rows.out, kept, pc::kBlock};
  }
  pc::Reduction<T> to;
  to.sum = sum;
  run(all, to);
}

template <typename T>
void reduce(const Rows<T>& rows, const pc::Reduction<T>& to) {
  const bool rank_one = rows.length == 1;
  if (to.dots || to.moment || to.sign || (to.sq_norms && !rank_one)) {
    run(rows, to);
    return;
  }
  if (to.sq_norms) rank_one_sq_norms(rows, to.sq_norms);
  if (to.sum) weighted_sum(rows, to.coef, to.sum);
}

template <typename T>
Outputs linear_reduce(const Tensor& x, const Tensor& g, const std::optional<Tensor>& coef,
                      const std::optional<Tensor>& direction, int64_t want) {
  const int64_t batch = x.size(0), positions = x.size(1), in = x.size(2), out = g.size(2);
  const pc::ReduceOp<T> op(g, {out, in}, coef, direction, want);
  if (std::min({batch, positions, in, out}) == 0) return op.outputs;
  const Tensor x_rows = pc::prepare<T>(x), g_rows = pc::prepare<T>(g);
  reduce(Rows<T>{pc::read<T>(x_rows), pc::read<T>(g_rows), in, out, batch * positions, positions},
         op.pointers());
  return op.outputs;
}

Outputs linear_reduce_cpu(const Tensor& x, const Tensor& g, const std::optional<Tensor>& coef,
                          const std::optional<Tensor>& direction, int64_t want) {
  return x.scalar_type() == pc::ScalarType::Double
             ? linear_reduce<double>(x, g, coef, direction, want)
             : linear_reduce<float>(x, g, coef, direction, want);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("linear_reduce", TORCH_BOX(&linear_reduce_cpu));
}
