// embedding_order on the CPU. Its schema and its truth: pycoherence/ops/embedding_order.py.

#include <algorithm>
#include <string>
#include <vector>

#include "lookups.h"
#include "order.h"
#include "reduce_op.h"

namespace {

using pc::Buffer;
using pc::Lookups;
using pc::Order;
using pc::Tensor;

// A row of the table, which lookups begin .. end share, some columns at a time. Examples that do
// not look it up have zeros there.
template <typename T>
class TableRow {
 public:
  TableRow(const Lookups& lookups, const T* g, int64_t width, const Order& order)
      : lookups_(lookups), g_(g), width_(width), order_(order), rows_(lookups.batch() * kColumns) {}

  void operator()(int64_t begin, int64_t end, T* to) {
    for (int64_t first = 0; first < width_; first += kColumns) {
      const int64_t size = std::min(kColumns, width_ - first);
      std::fill(rows_.begin(), rows_.end(), T{0});
      pc::vectorized([&](auto machine) PC_INLINED {
        const auto ones = [](int64_t) PC_INLINED { return T{1}; };
        for (int64_t i = begin; i < end;) {
          const int64_t next = lookups_.end_of(i, true);
          T* row = rows_.data() + lookups_.example(i) * kColumns;
          pc::add_up<decltype(machine)>(lookups_, i, next, g_ + first, width_, size, ones, row);
          i = next;
        }
      });
      pc::order_columns<T>({rows_.data(), lookups_.batch(), kColumns}, size, nullptr, order_,
                           to + first);
    }
  }

 private:
  static constexpr int64_t kColumns = 64;

  const Lookups& lookups_;
  const T* g_;
  int64_t width_;
  const Order& order_;
  Buffer<T> rows_;  // [B, kColumns]
};

template <typename T>
void order_table(const Lookups& lookups, const T* g, int64_t width, const Order& order, T* table) {
  constexpr int64_t step = 64;
  const int64_t slices = (lookups.count() + step - 1) / step;
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    TableRow<T> row(lookups, g, width, order);
    const int64_t stop = std::min(end * step, lookups.count());
    for (int64_t i = lookups.next_start(begin * step, false); i < stop;) {
      const int64_t next = lookups.end_of(i, false);
      row(i, next, table + lookups[i].id * width);
      i = next;
    }
  });
}

template <typename T>
Tensor embedding_order(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                       int64_t padding_idx, const Order& order) {
  const int64_t batch = g.size(0), positions = g.size(1), width = g.size(2);
  Tensor table = pc::new_empty<T>(g, {num_embeddings, width});
  const Tensor wide = pc::prepare_ids(ids);
  const int64_t* found = wide.const_data_ptr<int64_t>();
  const int64_t high = pc::check_ids("embedding_order", found, wide.numel(), num_embeddings);
  torch::stable::zero_(table);
  if (std::min({batch, positions, width}) == 0) return table;
  const Tensor rows = pc::prepare<T>(g);
  const Lookups lookups(found, batch, positions, padding_idx, high);
  order_table(lookups, pc::read<T>(rows), width, order, table.mutable_data_ptr<T>());
  return table;
}

Tensor embedding_order_cpu(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                           int64_t padding_idx, std::string rule, double k, bool drop) {
  const Order order = pc::make_order(rule, k, drop);
  return g.scalar_type() == pc::ScalarType::Double
             ? embedding_order<double>(ids, g, num_embeddings, padding_idx, order)
             : embedding_order<float>(ids, g, num_embeddings, padding_idx, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("embedding_order", TORCH_BOX(&embedding_order_cpu));
}
