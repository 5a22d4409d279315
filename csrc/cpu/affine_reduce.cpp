// affine_reduce on the CPU. Its schema and its truth: pycoherence/ops/affine_reduce.py.

#include <algorithm>

#include "dense.h"
#include "reduce_op.h"

namespace {

using pc::Outputs;
using pc::Reduction;
using pc::Tensor;

// Channels of one task; the tasks do not depend on the number of threads.
constexpr int64_t kChannels = 512;

// A factor broadcast to [B, T, C]; strides of 0 where it is.
template <typename T>
struct Strided {
  const T* data;
  int64_t batch, position, channel;
};

template <typename T>
struct Inputs {
  Strided<T> g, x, mean, rstd;  // data is null where absent
  int64_t positions, channels;
};

// g * (x - mean) * rstd
template <typename T>
PC_INLINE T product(T g, const T* x, const T* mean, const T* rstd, int64_t i, int64_t step_mean,
                    int64_t step_rstd) {
  if (x == nullptr) return g;
  const T centred = mean == nullptr ? x[i] : x[i] - mean[i * step_mean];
  return rstd == nullptr ? g * centred : g * (centred * rstd[i * step_rstd]);
}

template <typename T>
PC_INLINE const T* at(const Strided<T>& s, int64_t b, int64_t t, int64_t c) {
  return s.data == nullptr ? nullptr : s.data + b * s.batch + t * s.position + c * s.channel;
}

// Gradients of channels first .. last of one example, channels contiguous in g and x.
template <typename T>
PC_INLINE void channels_last(const Inputs<T>& in, int64_t b, int64_t first, int64_t last, T* out) {
  const int64_t size = last - first;
  pc::Buffer<T> block(size);
  for (int64_t start = 0; start < in.positions; start += pc::kBlock) {
    std::fill(block.begin(), block.end(), T{0});
    T* const sums = block.data();
    for (int64_t t = start; t < std::min(start + pc::kBlock, in.positions); ++t) {
      const T *g = at(in.g, b, t, first), *x = at(in.x, b, t, first);
      const T *mean = at(in.mean, b, t, first), *rstd = at(in.rstd, b, t, first);
      for (int64_t c = 0; c < size; ++c) {
        sums[c] += product(g[c], x, mean, rstd, c, in.mean.channel, in.rstd.channel);
      }
    }
    for (int64_t c = 0; c < size; ++c) out[first + c] += sums[c];
  }
}

// The same with positions contiguous in g and x.
template <typename T>
PC_INLINE void positions_last(const Inputs<T>& in, int64_t b, int64_t first, int64_t last, T* out) {
  constexpr int lanes = pc::kLine<T>;
  for (int64_t c = first; c < last; ++c) {
    const T *g = at(in.g, b, 0, c), *x = at(in.x, b, 0, c);
    const T *mean = at(in.mean, b, 0, c), *rstd = at(in.rstd, b, 0, c);
    T total = 0;
    for (int64_t start = 0; start < in.positions; start += pc::kBlock) {
      const int64_t end = std::min(start + pc::kBlock, in.positions);
      T sums[lanes] = {};
      int64_t t = start;
      for (; t + lanes <= end; t += lanes) {
        for (int i = 0; i < lanes; ++i) {
          sums[i] += product(g[t + i], x, mean, rstd, t + i, in.mean.position, in.rstd.position);
        }
      }
      for (; t < end; ++t) {
        sums[0] += product(g[t], x, mean, rstd, t, in.mean.position, in.rstd.position);
      }
      for (int i = 0; i < lanes; ++i) total += sums[i];
    }
    out[c] += total;
  }
}

template <typename T>
void reduce_rows(const T* rows, int64_t batch, int64_t channels, const Reduction<T>& to) {
  pc::Dense<T> dense(batch, to);
  dense.add({rows, batch, channels}, 0, channels);
  dense.finish();
}

template <typename T>
void run(const Inputs<T>& in, int64_t batch, const Reduction<T>& to) {
  // The shift of a single position has g itself for its gradient.
  if (in.x.data == nullptr && in.positions == 1 && in.g.channel == 1) {
    return reduce_rows(in.g.data, batch, in.channels, to);
  }
  const int64_t chunks = (in.channels + kChannels - 1) / kChannels;
  pc::Buffer<T> rows(batch * in.channels, T{0});
  torch::stable::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto) PC_INLINED {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / chunks, first = task % chunks * kChannels;
        const int64_t last = std::min(first + kChannels, in.channels);
        T* row = rows.data() + b * in.channels;
        in.g.channel == 1 ? channels_last(in, b, first, last, row)
                          : positions_last(in, b, first, last, row);
      }
    });
  });
  reduce_rows<T>(rows.data(), batch, in.channels, to);
}

template <typename T>
Strided<T> broadcast(const std::optional<Tensor>& x) {
  if (!x) return {nullptr, 0, 0, 0};
  const auto stride = [&](int64_t dim) { return x->size(dim) == 1 ? 0 : x->stride(dim); };
  return {pc::read<T>(*x), stride(0), stride(1), stride(2)};
}

template <typename T>
Outputs affine_reduce(const Tensor& g, const std::optional<Tensor>& x,
                      const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
                      const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                      int64_t want) {
  const pc::ReduceOp<T> op(g, {g.size(2)}, coef, direction, want);
  if (std::min({g.size(0), g.size(1), g.size(2)}) == 0) return op.zeros();
  // What a [B, C, T] layer has transposed is used as it lies in memory.
  const bool transposed = g.stride(2) != 1 && g.stride(1) == 1;
  const auto lay_out = [&](const Tensor& from) {
    return transposed ? torch::stable::transpose(
                            pc::prepare<T>(torch::stable::transpose(from, 1, 2)), 1, 2)
                      : pc::prepare<T>(from);
  };
  const Tensor g_laid = lay_out(g);
  std::optional<Tensor> x_laid, means, rstds;
  if (x) x_laid = lay_out(*x);
  if (mean) means = pc::prepare<T>(*mean);
  if (rstd) rstds = pc::prepare<T>(*rstd);
  Inputs<T> in{broadcast<T>(g_laid),
               broadcast<T>(x_laid),
               broadcast<T>(means),
               broadcast<T>(rstds),
               g.size(1),
               g.size(2)};
  in.g.channel = transposed ? in.g.channel : 1;
  run(in, g.size(0), op.pointers());
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
