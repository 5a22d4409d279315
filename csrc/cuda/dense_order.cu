// dense_order on CUDA. Its schema and its truth: pycoherence/ops/dense_order.py.

#include <string>
#include <vector>

#include "binding.h"
#include "dense_order.cuh"

namespace {

using pc::Tensor;

template <typename T>
Tensor dense_order(const Tensor& rows, const pc::Order& order) {
  std::vector<int64_t> shape;
  for (int64_t d = 1; d < rows.dim(); ++d) shape.push_back(rows.size(d));
  Tensor result = torch::stable::new_empty(rows, shape, pc::kDtype<T>);
  if (rows.numel() == 0) return torch::stable::zero_(result);
  const pc::Gpu gpu(rows);
  const Tensor prepared = pc::prepare<T>(rows);
  STD_CUDA_CHECK(pc::launch_dense_order(pc::read<T>(prepared), result.mutable_data_ptr<T>(),
                                        rows.size(0), result.numel(), order, gpu.stream()));
  return result;
}

Tensor dense_order_cuda(const Tensor& rows, std::string rule, double k, bool drop) {
  const pc::Order order = pc::make_order(rule, k, drop);
  return rows.scalar_type() == pc::ScalarType::Double ? dense_order<double>(rows, order)
                                                      : dense_order<float>(rows, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("dense_order", TORCH_BOX(&dense_order_cuda));
}
