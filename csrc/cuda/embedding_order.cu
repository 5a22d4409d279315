// embedding_order on CUDA. Its schema and its truth: pycoherence/ops/embedding_order.py.

#include <algorithm>
#include <string>

#include "binding.h"
#include "embedding_order.cuh"

namespace {

using pc::Tensor;

template <typename T>
Tensor embedding_order(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                       int64_t padding_idx, const pc::Order& order) {
  const pc::Gpu gpu(g);
  Tensor table = torch::stable::new_empty(g, {num_embeddings, g.size(2)}, pc::kDtype<T>);
  torch::stable::zero_(table);
  if (g.numel() == 0) return table;
  const Tensor rows = pc::prepare<T>(g), wide = pc::prepare_ids(ids);
  const auto [sorted, places] = pc::sort(torch::stable::view(wide, {wide.numel()}));
  const pc::Lookups<T> lookups = {sorted.const_data_ptr<int64_t>(),
                                  places.const_data_ptr<int64_t>(),
                                  pc::read<T>(rows),
                                  wide.numel(),
                                  g.size(1),
                                  g.size(2)};
  STD_CUDA_CHECK(pc::launch_embedding_order(lookups, table.mutable_data_ptr<T>(), num_embeddings,
                                            padding_idx, g.size(0), order, gpu.stream()));
  return table;
}

Tensor embedding_order_cuda(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                            int64_t padding_idx, std::string rule, double k, bool drop) {
  const pc::Order order = pc::make_order(rule, k, drop);
  return g.scalar_type() == pc::ScalarType::Double
             ? embedding_order<double>(ids, g, num_embeddings, padding_idx, order)
             : embedding_order<float>(ids, g, num_embeddings, padding_idx, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("embedding_order", TORCH_BOX(&embedding_order_cuda));
}
