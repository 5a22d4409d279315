// conv_order on the CPU. Its schema and its truth: pycoherence/ops/conv_order.py.

#include <string>
#include <vector>

#include "conv_op.h"
#include "depthwise.h"
#include "order.h"

namespace {

using pc::Buffer;
using pc::Order;
using pc::Patches;
using pc::Tensor;

// The median of the means of groups from their sums, of a parameter in torch's order.
template <typename T>
void median_of_sums(const Patches<T>& patches, const Order& order, T* out) {
  const int64_t groups = order.count(), size = patches.groups * patches.out * patches.in;
  Buffer<T> sums(groups * size);
  for (int64_t j = 0; j < groups; ++j) {
    pc::Reduction<T> to;
    to.weighted_sum = sums.data() + j * size;
    const int64_t first = pc::group_start(j, groups, patches.batch);
    pc::reduce_conv(patches.part(first, pc::group_start(j + 1, groups, patches.batch)), to);
  }
  const Order median{pc::Rule::kMedian, 0, false};
  const Buffer<T> shares = pc::group_shares<T>(groups, patches.batch);
  pc::order_rows<T>({sums.data(), groups, size}, size, shares.data(), median, out);
}

// The same, a tile of all groups at a time.
template <typename T>
void median_of_means(const Patches<T>& patches, const Order& order, T* out) {
  const Patches<T> groups = patches.grouped(order.count());
  const Order median{pc::Rule::kMedian, 0, false};
  const Buffer<T> shares = pc::group_shares<T>(groups.segments, patches.batch);
  pc::Reduction<T> to;
  to.coef = shares.data();
  to.order = &median;
  to.aggregate = out;
  pc::run_conv(groups, to);
}

template <typename T>
void order_dense(const Patches<T>& patches, const Order& order, T* out) {
  if (order.of_sums(pc::Rule::kMedianOfMeans)) return median_of_means(patches, order, out);
  pc::Reduction<T> to;
  to.order = &order;
  to.aggregate = out;
  pc::run_conv(patches, to);
}

// For a parameter in torch's order, as reduce_conv has it.
template <typename T>
void sign_agreement(const Patches<T>& patches, const Order& order, T* out) {
  Buffer<T> sign_sum(patches.groups * patches.out * patches.in);
  pc::Reduction<T> to;
  to.weighted_sum = out;
  to.sign_sum = sign_sum.data();
  pc::reduce_conv(patches, to);
  pc::keep_agreed(patches.batch, order.k, sign_sum, out);
}

// For a parameter in torch's order.
template <typename T>
void order_in_order(const Patches<T>& patches, const Order& order, T* out) {
  if (order.of_sums(pc::Rule::kSignAgreement)) return sign_agreement(patches, order, out);
  const int64_t sums = order.count() * patches.groups * patches.out * patches.in;
  const bool room = sums * int64_t{sizeof(T)} <= pc::workspace() / 2;
  if (order.of_sums(pc::Rule::kMedianOfMeans) && room) return median_of_sums(patches, order, out);
  const pc::TapsFirst<T> layout{patches.groups * patches.out, patches.channels,
                                patches.window.taps};
  if (layout.channels == 1 || layout.taps == 1) return order_dense(patches, order, out);
  Buffer<T> inner(layout.size());
  order_dense(patches, order, inner.data());
  layout.to_parameter(inner, out);
}

// One channel in and out of each group, some of them at a time.
template <typename T>
void order_depthwise(const Patches<T>& patches, const Order& order, T* out) {
  const int64_t taps = patches.window.taps, step = pc::channels_at_once(patches, patches.batch);
  for (int64_t first = 0; first < patches.groups; first += step) {
    const int64_t last = std::min(first + step, patches.groups), count = last - first;
    const Buffer<T> rows = pc::depthwise_rows(patches, first, last);
    Buffer<T> inner(taps * count);
    const pc::Rows<T> all{rows.data(), patches.batch, taps * count};
    pc::order_rows<T>(all, taps * count, nullptr, order, inner.data());
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        out[(first + c) * taps + tap] = inner[tap * count + c];
      }
    }
  }
}

template <typename T>
Tensor conv_order(const Tensor& x, const Tensor& g, const pc::ConvOptions& options,
                  const Order& order) {
  std::vector<int64_t> shape = {g.size(1), x.size(1) / options.groups};
  shape.insert(shape.end(), options.kernel_size.begin(), options.kernel_size.end());
  Tensor result = pc::new_empty<T>(g, shape);
  const pc::ConvBatch<T> batch(x, g, options);
  if (batch.empty()) return torch::stable::zero_(result);
  const Patches<T> patches = batch.patches();
  T* out = result.mutable_data_ptr<T>();
  patches.depthwise() ? order_depthwise(patches, order, out) : order_in_order(patches, order, out);
  return result;
}

Tensor conv_order_cpu(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel_size,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups, std::string rule,
                      double k, bool drop) {
  const pc::ConvOptions options{kernel_size, stride, padding, dilation, groups};
  const Order order = pc::make_order(rule, k, drop);
  return x.scalar_type() == pc::ScalarType::Double ? conv_order<double>(x, g, options, order)
                                                   : conv_order<float>(x, g, options, order);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("conv_order", TORCH_BOX(&conv_order_cpu));
}
