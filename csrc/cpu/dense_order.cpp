// dense_order on the CPU. Its schema and its truth: pycoherence/ops/dense_order.py.

#include <algorithm>
#include <string>
#include <vector>

#include "columns.h"
#include "reduce_op.h"

template <typename T>
void pc::order_columns(const Rows<T>& rows, int64_t size, const T* coef, const Order& order,
                       T* out) {
  vectorized([&](auto machine) PC_INLINED {
    using V = Vector<decltype(machine), T>;
    Columns<decltype(machine), T> columns(rows.count, order);
    for (int64_t i = 0; i < size; i += kLanesOf<V>) {
      const auto value = [&](int64_t b) PC_INLINED {
        const V row = load_some<V>(rows(b) + i, size - i);
        return coef == nullptr ? row : row * coef[b];
      };
      store_some<V>(out + i, columns(value), size - i);
    }
  });
}

template <typename T>
void pc::order_rows(const Rows<T>& rows, int64_t size, const T* coef, const Order& order, T* out) {
  constexpr int64_t width = 256;
  torch::stable::parallel_for(0, (size + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * width, last = std::min(end * width, size);
    const Rows<T> some{rows.data + first, rows.count, rows.stride};
    order_columns(some, last - first, coef, order, out + first);
  });
}

template void pc::order_columns(const Rows<float>&, int64_t, const float*, const Order&, float*);
template void pc::order_columns(const Rows<double>&, int64_t, const double*, const Order&, double*);
template void pc::order_rows(const Rows<float>&, int64_t, const float*, const Order&, float*);
template void pc::order_rows(const Rows<double>&, int64_t, const double*, const Order&, double*);

namespace {

using pc::Order;
using pc::Tensor;

template <typename T>
Tensor dense_order(const Tensor& rows, const Order& order) {
  const int64_t batch = rows.size(0);
  std::vector<int64_t> shape;
  for (int64_t d = 1; d < rows.dim(); ++d) shape.push_back(rows.size(d));
  Tensor result = pc::new_empty<T>(rows, shape);
  if (rows.numel() == 0) return torch::stable::zero_(result);
  const Tensor prepared = pc::prepare<T>(rows);
  const int64_t size = result.numel();
  const pc::Rows<T> all{pc::read<T>(prepared), batch, size};
  pc::order_rows<T>(all, size, nullptr, order, result.mutable_data_ptr<T>());
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
