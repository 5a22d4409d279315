// dense_order on the CPU. Its schema and its truth: pycoherence/ops/dense_order.py.

#include <algorithm>
#include <string>

#include "order.h"
#include "reduce_op.h"

namespace {

using pc::Order;
using pc::Tensor;

// out[i] of columns i of rows [batch, size].
template <typename T>
void order_rows(const T* rows, int64_t batch, int64_t size, const Order& order, T* out) {
  constexpr int64_t width = 256;
  torch::stable::parallel_for(0, (size + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto machine) PC_INLINED {
      using V = pc::Vector<decltype(machine), T>;
      pc::Columns<decltype(machine), T> columns(batch, order);
      const int64_t last = std::min(end * width, size);
      for (int64_t i = begin * width; i < last; i += pc::kLanesOf<V>) {
        const T* from = rows + i;
        const int64_t count = size - i;
        const auto value = [&](int64_t b)
                               PC_INLINED { return pc::load_some<V>(from + b * size, count); };
        pc::store_some<V>(out + i, columns(value), count);
      }
    });
  });
}

template <typename T>
Tensor dense_order(const Tensor& rows, const Order& order) {
  const int64_t batch = rows.size(0);
  std::vector<int64_t> shape;
  for (int64_t d = 1; d < rows.dim(); ++d) shape.push_back(rows.size(d));
  Tensor result = torch::stable::new_empty(rows, shape, pc::kDtype<T>);
  if (rows.numel() == 0) return torch::stable::zero_(result);
  const Tensor prepared = pc::prepare<T>(rows);
  order_rows(pc::read<T>(prepared), batch, result.numel(), order, result.mutable_data_ptr<T>());
  return result;
}

Tensor dense_order_cpu(const Tensor& rows, std::string rule, double k, bool drop) {
  const Order order = pc::make_order(rule, k, drop);
  return rows.scalar_type() == pc::ScalarType::Double ? dense_order<double>(rows, order)
                                                      : dense_order<float>(rows, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("dense_order", TORCH_BOX(&dense_order_cpu));
}
