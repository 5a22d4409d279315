// linear_order on the CPU. Its schema and its truth: pycoherence/ops/linear_order.py.

#include <algorithm>
#include <string>

#include "columns.h"
#include "linear.h"
#include "reduce_op.h"

namespace {

using pc::Buffer;
using pc::Linear;
using pc::Order;
using pc::Tensor;

// The median of the means of groups, which take no more than the sum over all examples.
template <typename T>
void median_of_means(const Linear<T>& linear, const Order& order, T* out) {
  const Linear<T> groups = linear.grouped(order.count());
  const Order median{pc::Rule::kMedian, 0, false};
  const Buffer<T> shares = pc::group_shares<T>(groups.segments, linear.segments);
  pc::Reduction<T> to;
  to.coef = shares.data();
  to.order = &median;
  to.aggregate = out;
  pc::run_linear(groups, to);
}

// [columns, rows] from [rows, columns].
template <typename T>
Buffer<T> transpose(const T* from, int64_t rows, int64_t columns) {
  constexpr int64_t block = 16;
  Buffer<T> to(rows * columns);
  torch::stable::parallel_for(0, (columns + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * block; start < std::min(end * block, columns); start += block) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = start; c < std::min(start + block, columns); ++c) {
          to[c * rows + row] = from[row * columns + c];
        }
      }
    }
  });
  return to;
}

// With one position a value is a number of g times one of x, made where it is needed.
template <typename T>
void order_rank_one(const Linear<T>& linear, const Order& order, T* out) {
  constexpr int64_t width = pc::kLine<T>, height = 64;
  const int64_t batch = linear.segments, in = linear.in;
  const Buffer<T> g = transpose(linear.g, batch, linear.out);
  const int64_t across = (in + width - 1) / width, down = (linear.out + height - 1) / height;
  torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto machine) PC_INLINED {
      using V = pc::Vector<decltype(machine), T>;
      pc::Columns<decltype(machine), T> columns(batch, order);
      Buffer<T> x(batch * width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % across * width, used = std::min(width, in - first);
        const auto row = [&](int64_t b) PC_INLINED { return linear.x + b * in + first; };
        pc::pack_columns<width>(row, batch, used, x.data());
        const int64_t start = task / across * height;
        for (int64_t o = start; o < std::min(start + height, linear.out); ++o) {
          for (int64_t i = 0; i < used; i += pc::kLanesOf<V>) {
            const auto value = [&](int64_t b) PC_INLINED {
              return pc::load<V>(x.data() + b * width + i) * g[o * batch + b];
            };
            pc::store_some<V>(out + o * in + first + i, columns(value), used - i);
          }
        }
      }
    });
  });
}

template <typename T>
void sign_agreement(const Linear<T>& linear, const Order& order, T* out) {
  Buffer<T> sign_sum(linear.in * linear.out);
  pc::Reduction<T> to;
  to.weighted_sum = out;
  to.sign_sum = sign_sum.data();
  pc::reduce_linear(linear, to);
  pc::keep_agreed(linear.segments, order.k, sign_sum, out);
}

template <typename T>
void order_linear(const Linear<T>& linear, const Order& order, T* out) {
  if (order.of_sums(pc::Rule::kMedianOfMeans)) return median_of_means(linear, order, out);
  if (order.of_sums(pc::Rule::kSignAgreement)) return sign_agreement(linear, order, out);
  if (linear.length == 1) return order_rank_one(linear, order, out);
  pc::Reduction<T> to;
  to.order = &order;
  to.aggregate = out;
  pc::run_linear(linear, to);
}

template <typename T>
Tensor linear_order(const Tensor& x, const Tensor& g, const Order& order) {
  const int64_t batch = x.size(0), positions = x.size(1), in = x.size(2), out = g.size(2);
  Tensor result = pc::new_empty<T>(g, {out, in});
  if (std::min({batch, positions, in, out}) == 0) return torch::stable::zero_(result);
  const Tensor x_rows = pc::prepare<T>(x), g_rows = pc::prepare<T>(g);
  order_linear(Linear<T>(pc::read<T>(x_rows), pc::read<T>(g_rows), in, out, batch, positions),
               order, result.mutable_data_ptr<T>());
  return result;
}

Tensor linear_order_cpu(const Tensor& x, const Tensor& g, std::string rule, double k, bool drop) {
  const Order order = pc::make_order(rule, k, drop);
  return x.scalar_type() == pc::ScalarType::Double ? linear_order<double>(x, g, order)
                                                   : linear_order<float>(x, g, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("linear_order", TORCH_BOX(&linear_order_cpu));
}
