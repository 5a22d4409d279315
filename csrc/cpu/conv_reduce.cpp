// conv_reduce on the CPU. Its schema and its truth: pycoherence/ops/conv_reduce.py.

#include <algorithm>

#include "conv_op.h"
#include "depthwise.h"
#include "linear.h"
#include "plan.h"
#include "reduce_op.h"
#include "tile_engine.h"
#include "workspace.h"

namespace {

using pc::Buffer;
using pc::Outputs;
using pc::Patches;
using pc::Reduction;
using pc::Tensor;

// ||G_b||^2 from the patches of one example at a time.
template <typename T>
void patch_sq_norms(const Patches<T>& patches, T* sq_norms) {
  const int64_t positions = patches.window.positions, in = patches.in, out = patches.out;
  torch::stable::parallel_for(0, patches.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> x(positions * in), g(positions * out);
    for (int64_t b = begin; b < end; ++b) {
      double sum = 0;
      for (int64_t group = 0; group < patches.groups; ++group) {
        pc::vectorized([&](auto machine) PC_INLINED {
          patches.unfold(group, b, x.data());
          patches.g.copy(b, group * out, out, g.data());
          sum += pc::sq_norm_of<decltype(machine), T>(
              {{x.data(), positions, in}, {g.data(), positions, out}, in, out});
        });
      }
      sq_norms[b] = static_cast<T>(sum);
    }
  });
}

// All patches in memory, with which a group is a linear layer.
template <typename T>
class Unfolded {
 public:
  explicit Unfolded(const Patches<T>& patches) : patches_(patches) {
    const int64_t in = patches.window.positions * patches.in;
    const int64_t out = patches.window.positions * patches.out;
    x_.resize(patches.batch * in);
    g_.resize(patches.batch * out);
    torch::stable::parallel_for(0, patches.batch, 1, [&](int64_t begin, int64_t end) {
      pc::vectorized([&](auto) PC_INLINED {
        for (int64_t b = begin; b < end; ++b) {
          patches.unfold(0, b, x_.data() + b * in);
          patches.g.copy(b, 0, patches.out, g_.data() + b * out);
        }
      });
    });
  }

  static int64_t bytes(const Patches<T>& patches) {
    return patches.batch * patches.window.positions * (patches.in + patches.out) *
           int64_t{sizeof(T)};
  }

  pc::Linear<T> linear() const {
    return {x_.data(),    g_.data(),      patches_.in,
            patches_.out, patches_.batch, patches_.window.positions};
  }

 private:
  const Patches<T>& patches_;
  Buffer<T> x_, g_;
};

template <typename T>
void reduce(const Patches<T>& patches, const Reduction<T>& to) {
  const int64_t positions = patches.window.positions;
  pc::Plan plan =
      pc::make_plan(patches.batch, positions, patches.in, patches.out, patches.groups, to);
  const bool room = Unfolded<T>::bytes(patches) <= pc::workspace() / 2;
  const bool as_rows = positions == 1 || plan.ghost_gram || plan.plain_dots;
  if (patches.groups == 1 && room && as_rows) {
    return pc::reduce_linear(Unfolded<T>(patches).linear(), to);
  }
  plan.ghost_gram = plan.plain_dots = false;
  plan.plain_sum &= to.coef == nullptr;
  if (plan.ghost_norms) patch_sq_norms(patches, to.sq_norms);
  if (plan.plain_sum) {
    const int64_t together = std::max<int64_t>(1, pc::kBlock / positions);
    Reduction<T> sum;
    sum.weighted_sum = to.weighted_sum;
    pc::run_engine(patches.grouped((patches.batch + together - 1) / together), sum);
  }
  const Reduction<T> rest = pc::left_over(plan, to);
  if (rest.any()) pc::run_engine(patches, rest);
}

// Like reduce, for a parameter in torch's order.
template <typename T>
void reduce_in_order(const Patches<T>& patches, const Reduction<T>& to) {
  const pc::TapsFirst<T> layout{patches.groups * patches.out, patches.channels,
                                patches.window.taps};
  if (layout.channels == 1 || layout.taps == 1) return reduce(patches, to);
  const auto buffer = [&](const T* wanted) { return Buffer<T>(wanted ? layout.size() : 0); };
  const auto data = [](auto& values) { return values.empty() ? nullptr : values.data(); };
  const Buffer<T> along = layout.from_parameter(to.direction);
  Buffer<T> weighted_sum = buffer(to.weighted_sum), second_moment = buffer(to.second_moment),
            sign_sum = buffer(to.sign_sum);
  Reduction<T> inner = to;
  inner.direction = data(along);
  inner.weighted_sum = data(weighted_sum);
  inner.second_moment = data(second_moment);
  inner.sign_sum = data(sign_sum);
  reduce(patches, inner);
  layout.to_parameter(weighted_sum, to.weighted_sum);
  layout.to_parameter(second_moment, to.second_moment);
  layout.to_parameter(sign_sum, to.sign_sum);
}

}  // namespace

template <typename T>
void pc::reduce_conv(const Patches<T>& patches, const Reduction<T>& to) {
  patches.depthwise() ? reduce_depthwise(patches, to) : reduce_in_order(patches, to);
}

template <typename T>
void pc::run_conv(const Patches<T>& patches, const Reduction<T>& to) {
  run_engine(patches, to);
}

template <typename T>
void pc::gram_conv(const Patches<T>& a, const Patches<T>& b, T* gram) {
  if (a.depthwise()) return gram_depthwise(a, b, gram);
  const bool room = Unfolded<T>::bytes(a) + Unfolded<T>::bytes(b) <= workspace() / 2;
  if (a.groups == 1 && room &&
      cross_by_ghost(a.batch, a.window.positions, b.batch, b.window.positions, a.in, a.out)) {
    return gram_linear(Unfolded<T>(a).linear(), Unfolded<T>(b).linear(), gram);
  }
  Reduction<T> to;
  to.gram = gram;
  run_engine(a, to, &b);
}

template void pc::reduce_conv(const Patches<float>&, const Reduction<float>&);
template void pc::reduce_conv(const Patches<double>&, const Reduction<double>&);
template void pc::run_conv(const Patches<float>&, const Reduction<float>&);
template void pc::run_conv(const Patches<double>&, const Reduction<double>&);
template void pc::gram_conv(const Patches<float>&, const Patches<float>&, float*);
template void pc::gram_conv(const Patches<double>&, const Patches<double>&, double*);

namespace {

template <typename T>
Outputs conv_reduce(const Tensor& x, const Tensor& g, const pc::ConvOptions& options,
                    const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                    int64_t want) {
  std::vector<int64_t> shape = {g.size(1), x.size(1) / options.groups};
  shape.insert(shape.end(), options.kernel_size.begin(), options.kernel_size.end());
  const pc::ReduceOp<T> op(g, shape, coef, direction, want);
  const pc::ConvBatch<T> batch(x, g, options);
  if (batch.empty()) return pc::zeros(op.outputs);
  pc::reduce_conv(batch.patches(), op.pointers());
  return op.outputs;
}

Outputs conv_reduce_cpu(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel_size,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups,
                        const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                        int64_t want) {
  const pc::ConvOptions options{kernel_size, stride, padding, dilation, groups};
  return x.scalar_type() == pc::ScalarType::Double
             ? conv_reduce<double>(x, g, options, coef, direction, want)
             : conv_reduce<float>(x, g, options, coef, direction, want);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("conv_reduce", TORCH_BOX(&conv_reduce_cpu));
}
