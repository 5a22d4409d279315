// linear_order of one position on CUDA. Its schema and its truth: pycoherence/ops/linear_order.py.

#include <algorithm>
#include <string>

#include "binding.h"
#include "linear_order.cuh"

namespace {

using pc::Tensor;

template <typename T>
Tensor linear_order(const Tensor& x, const Tensor& g, const pc::Order& order) {
  const int64_t batch = x.size(0), in = x.size(2), out = g.size(2);
  Tensor result = torch::stable::new_empty(g, {out, in}, pc::kDtype<T>);
  if (std::min({batch, x.size(1), in, out}) == 0) return torch::stable::zero_(result);
  const pc::Gpu gpu(g);
  const Tensor x_rows = pc::prepare<T>(x), g_rows = pc::prepare<T>(g);
  STD_CUDA_CHECK(pc::launch_linear_order(pc::read<T>(x_rows), pc::read<T>(g_rows),
                                         result.mutable_data_ptr<T>(), batch, in, out, order,
                                         gpu.stream()));
  return result;
}

Tensor linear_order_cuda(const Tensor& x, const Tensor& g, std::string rule, double k, bool drop) {
  const pc::Order order = pc::make_order(rule, k, drop);
  return x.scalar_type() == pc::ScalarType::Double ? linear_order<double>(x, g, order)
                                                   : linear_order<float>(x, g, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("linear_order", TORCH_BOX(&linear_order_cuda));
}
