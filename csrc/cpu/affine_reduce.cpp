// affine_reduce on the CPU. Its schema and its truth: pycoherence/ops/affine_reduce.py.

#include <algorithm>

#include "dense.h"
#include "reduce_op.h"

namespace {

using pc::load;
using pc::Outputs;
using pc::Reduction;
using pc::Tensor;

// A factor broadcast to [B, outer, inner], whose inner numbers lie one after another:
// positions and channels, or the other way round. Strides are 0 where it is broadcast.
template <typename T>
struct Factor {
  const T* data;  // null where absent
  int64_t batch, outer, inner;

  PC_INLINE const T* at(int64_t b, int64_t o, int64_t i) const {
    return data + b * batch + o * outer + i * inner;
  }
};

template <typename T>
struct Inputs {
  Factor<T> g, x, mean, rstd;
  int64_t batch, outer, inner;
  bool channels_last;

  int64_t channels() const { return channels_last ? inner : outer; }
};

// The factor of g: nothing, x, or x normalised by statistics that are the same for all
// inner numbers, or may not be.
enum class Kind { kShift, kScale, kAlike, kNormal };

template <typename T>
Kind kind_of(const Inputs<T>& in) {
  if (in.x.data == nullptr) return Kind::kShift;
  if (in.mean.data == nullptr && in.rstd.data == nullptr) return Kind::kScale;
  return in.mean.inner == 0 && in.rstd.inner == 0 ? Kind::kAlike : Kind::kNormal;
}

// g * (x - mean) * rstd of one run of inner numbers.
template <Kind kind, typename T>
struct Run {
  PC_INLINE Run(const Inputs<T>& in, int64_t b, int64_t o, int64_t first)
      : g(in.g.at(b, o, first)),
        soon(in.g.at(b, o + 16, first)),
        x(in.x.at(b, o, first)),
        mean(in.mean.at(b, o, first)),
        rstd(in.rstd.at(b, o, first)),
        mean_step(in.mean.inner),
        rstd_step(in.rstd.inner) {
    if constexpr (kind == Kind::kAlike) {
      one_mean = *mean;
      one_rstd = *rstd;
    }
  }

  template <typename V>
  PC_INLINE V at(int64_t i) const {
    const V value = load<V>(g + i);
    if constexpr (kind == Kind::kShift) {
      // Nothing but memory takes time, and rows of many channels lie far apart.
      __builtin_prefetch(soon + i);
      return value;
    } else if constexpr (kind == Kind::kScale) {
      return value * load<V>(x + i);
    } else if constexpr (kind == Kind::kAlike) {
      return value * ((load<V>(x + i) - one_mean) * one_rstd);
    } else {
      return value * ((load<V>(x + i) - some<V>(mean, i * mean_step, mean_step)) *
                      some<V>(rstd, i * rstd_step, rstd_step));
    }
  }

  template <typename V>
  static PC_INLINE V some(const T* from, int64_t i, int64_t step) {
    return step == 0 ? *from - V{} : load<V>(from + i);
  }

  const T *g, *soon, *x, *mean, *rstd;
  int64_t mean_step, rstd_step;
  T one_mean = 0, one_rstd = 1;
};

// Gradients of `size` channels of one example.
template <typename Machine, Kind kind, typename T>
PC_INLINE void sum_positions(const Inputs<T>& in, int64_t b, int64_t first, int64_t size, T* to) {
  if (in.channels_last) {
    constexpr int64_t several = kind == Kind::kShift || kind == Kind::kScale ? 8 : 4;
    pc::sum_columns<Machine, several>(
        in.outer, size, to, [&](int64_t t) PC_INLINED { return Run<kind, T>(in, b, t, first); });
    return;
  }
  for (int64_t c = 0; c < size; ++c) {
    const Run<kind, T> run(in, b, first + c, 0);
    const double sum = pc::sum_terms<Machine, T>(
        in.inner, [&]<typename V>(int64_t t) PC_INLINED { return run.template at<V>(t); });
    to[c] = static_cast<T>(sum);
  }
}

// A task has some channels of one example.
template <Kind kind, typename T>
void sum_positions(const Inputs<T>& in, T* rows) {
  const int64_t channels = in.channels(), width = std::min(channels, pc::kColumns);
  const int64_t chunks = (channels + width - 1) / width;
  const int64_t grain = pc::kGrain / (width * in.outer * in.inner / channels) + 1;
  torch::stable::parallel_for(0, in.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto machine) PC_INLINED {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunks, first = task % chunks * width;
        sum_positions<decltype(machine), kind>(in, b, first, std::min(width, channels - first),
                                               rows + b * channels + first);
      }
    });
  });
}

template <typename T>
void reduce_rows(const pc::Rows<T>& rows, int64_t channels, const Reduction<T>& to) {
  pc::Dense<T> dense(rows.count, to);
  dense.add(rows, 0, channels);
  dense.finish();
}

template <typename T>
void run(const Inputs<T>& in, const Reduction<T>& to) {
  const Kind kind = kind_of(in);
  // The shift of a single position has g itself for its gradient.
  if (kind == Kind::kShift && in.channels_last && in.outer == 1) {
    return reduce_rows<T>({in.g.data, in.batch, in.g.batch}, in.inner, to);
  }
  pc::Buffer<T> rows(in.batch * in.channels());
  if (kind == Kind::kShift) sum_positions<Kind::kShift>(in, rows.data());
  if (kind == Kind::kScale) sum_positions<Kind::kScale>(in, rows.data());
  if (kind == Kind::kAlike) sum_positions<Kind::kAlike>(in, rows.data());
  if (kind == Kind::kNormal) sum_positions<Kind::kNormal>(in, rows.data());
  reduce_rows<T>({rows.data(), in.batch, in.channels()}, in.channels(), to);
}

// The tensor in the dtype T, [B, outer, inner], its inner numbers one after another; as it lies in
// memory if it can be.
template <typename T>
std::optional<Tensor> lay_out(const std::optional<Tensor>& x, bool channels_last) {
  if (!x) return x;
  const Tensor laid = channels_last ? *x : torch::stable::transpose(*x, 1, 2);
  const bool readable = laid.stride(2) == 1 || laid.size(2) == 1;
  return readable && laid.scalar_type() == pc::kDtype<T> ? laid : pc::prepare<T>(laid);
}

template <typename T>
Factor<T> broadcast(const std::optional<Tensor>& x, const T* absent) {
  if (!x) return {absent, 0, 0, 0};
  const auto stride = [&](int64_t dim) { return x->size(dim) == 1 ? 0 : x->stride(dim); };
  return {pc::read<T>(*x), stride(0), stride(1), stride(2)};
}

template <typename T>
Outputs affine_reduce(const Tensor& g, const std::optional<Tensor>& x,
                      const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
                      const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                      int64_t want) {
  const int64_t batch = g.size(0), positions = g.size(1), channels = g.size(2);
  const pc::ReduceOp<T> op(g, {channels}, coef, direction, want);
  if (std::min({batch, positions, channels}) == 0) return pc::zeros(op.outputs);
  // A tensor that a [B, C, T] layer has transposed is used as it lies in memory.
  const bool channels_last =
      positions == 1 || g.stride(1) != 1 || (g.stride(2) == 1 && channels > 1);
  const auto of = [&](const std::optional<Tensor>& from) {
    return lay_out<T>(from, channels_last);
  };
  const std::optional<Tensor> gs = of(g), xs = of(x), means = of(mean), rstds = of(rstd);
  const T zero = 0, one = 1;
  const bool normal = mean || rstd;
  run<T>({broadcast<T>(gs, nullptr), broadcast<T>(xs, nullptr),
          broadcast<T>(means, normal ? &zero : nullptr),
          broadcast<T>(rstds, normal ? &one : nullptr), batch, channels_last ? positions : channels,
          channels_last ? channels : positions, channels_last},
         op.pointers());
  return op.outputs;
}

Outputs affine_reduce_cpu(const Tensor& g, const std::optional<Tensor>& x,
                          const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
                          const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                          int64_t want) {
  return g.scalar_type() == pc::ScalarType::Double
             ? affine_reduce<double>(g, x, mean, rstd, coef, direction, want)
             : affine_reduce<float>(g, x, mean, rstd, coef, direction, want);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("affine_reduce", TORCH_BOX(&affine_reduce_cpu));
}
