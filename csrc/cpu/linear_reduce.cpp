// linear_reduce on the CPU. Its schema and its truth: pycoherence/ops/linear_reduce.py.

#include <algorithm>
#include <cstdint>

#include "linear.h"
#include "plan.h"
#include "rank_one.h"
#include "reduce_op.h"
#include "tile_engine.h"

template <typename T>
void pc::reduce_linear(const Linear<T>& linear, const Reduction<T>& to) {
  const int64_t batch = linear.segments, positions = linear.length;
  if (positions == 1) return reduce_rank_one(linear, to);
  const Plan plan = make_plan(batch, positions, linear.in, linear.out, 1, to);
  if (plan.ghost_gram) ghost_reduce(linear.factors(), positions, to);
  if (plan.ghost_norms) ghost_sq_norms(linear.factors(), positions, to.sq_norms);
  if (plan.plain_sum) sum_rows(linear, to.coef, to.weighted_sum);
  if (plan.plain_dots) dots_by_rows(linear, to.direction, to.dots);
  const Reduction<T> rest = left_over(plan, to);
  if (rest.any()) run_engine(linear, rest);
}

template <typename T>
void pc::run_linear(const Linear<T>& linear, const Reduction<T>& to) {
  run_engine(linear, to);
}

template <typename T>
void pc::gram_linear(const Linear<T>& a, const Linear<T>& b, T* gram) {
  if (cross_by_ghost(a.segments, a.length, b.segments, b.length, a.in, a.out)) {
    std::fill_n(gram, a.segments * b.segments, T{0});
    return ghost_gram(a.factors(), b.factors(), a.length, b.length, false, gram);
  }
  Reduction<T> to;
  to.gram = gram;
  run_engine(a, to, &b);
}

template void pc::reduce_linear(const Linear<float>&, const Reduction<float>&);
template void pc::reduce_linear(const Linear<double>&, const Reduction<double>&);
template void pc::run_linear(const Linear<float>&, const Reduction<float>&);
template void pc::run_linear(const Linear<double>&, const Reduction<double>&);
template void pc::gram_linear(const Linear<float>&, const Linear<float>&, float*);
template void pc::gram_linear(const Linear<double>&, const Linear<double>&, double*);

namespace {

using pc::Outputs;
using pc::Tensor;

template <typename T>
Outputs linear_reduce(const Tensor& x, const Tensor& g, const std::optional<Tensor>& coef,
                      const std::optional<Tensor>& direction, int64_t want) {
  const int64_t batch = x.size(0), positions = x.size(1), in = x.size(2), out = g.size(2);
  const pc::ReduceOp<T> op(g, {out, in}, coef, direction, want);
  if (std::min({batch, positions, in, out}) == 0) return pc::zeros(op.outputs);
  const Tensor x_rows = pc::prepare<T>(x), g_rows = pc::prepare<T>(g);
  pc::reduce_linear(
      pc::Linear<T>(pc::read<T>(x_rows), pc::read<T>(g_rows), in, out, batch, positions),
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
