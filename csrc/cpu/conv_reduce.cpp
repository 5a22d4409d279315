// conv_reduce on the CPU. Its schema and its truth: pycoherence/ops/conv_reduce.py.

#include <algorithm>
#include <array>

#include "reduce_op.h"
#include "tile_engine.h"

namespace {

using pc::Outputs;
using pc::Reduction;
using pc::Tensor;

// A window of up to three dimensions, and which input each of its taps meets at each position.
struct Window {
  int64_t taps = 1, inputs = 1, positions = 1;
  std::vector<int64_t> input;  // [taps, positions], -1 in the padding

  Window(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel,
         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
         const std::vector<int64_t>& dilation) {
    const int64_t dims = static_cast<int64_t>(kernel.size());
    for (int64_t d = 0; d < dims; ++d) {
      taps *= kernel[d];
      inputs *= x.size(2 + d);
      positions *= g.size(2 + d);
    }
    input.assign(taps * positions, 0);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t t = 0; t < positions; ++t) {
        int64_t index = 0, step = 1, tap_left = tap, t_left = t;
        for (int64_t d = dims - 1; d >= 0; --d) {
          const int64_t at =
              t_left % g.size(2 + d) * stride[d] - padding[d] + tap_left % kernel[d] * dilation[d];
          const bool outside = at < 0 || at >= x.size(2 + d) || index < 0;
          index = outside ? -1 : index + at * step;
          step *= x.size(2 + d);
          tap_left /= kernel[d];
          t_left /= g.size(2 + d);
        }
        input[tap * positions + t] = index;
      }
    }
  }
};

// The factors of one group of channels. The columns of x are patches, taps times channels, gathered
// when a tile asks for them.
template <typename T>
struct Patches {
  const T* x;  // [B, inputs, groups * in]
  const T* g;  // [B, positions, groups * out]
  const Window& window;
  int64_t in, out, groups;
  int64_t segments;
  int64_t group;

  int64_t positions(int64_t) const { return window.positions; }

  PC_INLINE void pack_x(int64_t b, int64_t first, int64_t used, T* to) const {
    constexpr int64_t size = pc::kLanes<T>;
    const T* from = x + b * window.inputs * groups * in + group * in;
    for (int64_t i = 0; i < used; i += size, to += window.positions * size) {
      const int64_t end = std::min(i + size, used);
      if (end < i + size) std::fill_n(to, window.positions * size, T{0});
      for (int64_t j = i; j < end;) {
        const int64_t tap = (first + j) / in, channel = (first + j) % in;
        const int64_t run = std::min(in - channel, end - j);
        gather(from + channel, window.input.data() + tap * window.positions, run, to + j - i);
        j += run;
      }
    }
  }

  PC_INLINE void pack_g(int64_t b, int64_t first, int64_t used, T* to) const {
    const int64_t width = groups * out;
    const T* from = g + b * window.positions * width + group * out + first;
    pc::pack_columns<pc::kPanel>(from, width, used, window.positions, to);
  }

 private:
  // A run of channels of the inputs that one tap meets, to rows of kLanes.
  PC_INLINE void gather(const T* from, const int64_t* input, int64_t run, T* to) const {
    constexpr int64_t size = pc::kLanes<T>;
    for (int64_t t = 0; t < window.positions; ++t, to += size) {
      const T* row = from + input[t] * groups * in;
      if (input[t] < 0) {
        std::fill_n(to, run, T{0});
      } else if (run == size) {
        std::memcpy(to, row, size * sizeof(T));
      } else {
        std::copy_n(row, run, to);
      }
    }
  }
};

PC_CLONES void run_tile(const Patches<float>& patches, const pc::Grid<float>& grid, int64_t tile,
                        const Reduction<float>& to, int64_t part, int64_t parts) {
  pc::reduce_tile(patches, grid, tile, to, part, parts);
}

PC_CLONES void run_tile(const Patches<double>& patches, const pc::Grid<double>& grid, int64_t tile,
                        const Reduction<double>& to, int64_t part, int64_t parts) {
  pc::reduce_tile(patches, grid, tile, to, part, parts);
}

// The engine has taps before channels, the parameter has [out, in, taps].
template <typename T>
struct TapsFirst {
  int64_t rows, in, taps;

  pc::Buffer<T> from_parameter(const T* parameter) const {
    pc::Buffer<T> result(parameter == nullptr ? 0 : rows * in * taps);
    for (int64_t i = 0; i < static_cast<int64_t>(result.size()); ++i) {
      result[i] = parameter[at(i)];
    }
    return result;
  }

  void to_parameter(const pc::Buffer<T>& values, T* parameter) const {
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) parameter[at(i)] = values[i];
  }

  int64_t at(int64_t i) const {
    const int64_t row = i / (in * taps), tap = i / in % taps, channel = i % in;
    return (row * in + channel) * taps + tap;
  }
};

// [B, C, *S] to [B, S, C]; what is channels_last in memory stays where it is.
template <typename T>
Tensor positions_first(const Tensor& x) {
  return pc::prepare<T>(torch::stable::transpose(torch::stable::flatten(x, 2, -1), 1, 2));
}

template <typename T>
Outputs conv_reduce(const Tensor& x, const Tensor& g, const Window& window, int64_t groups,
                    const std::vector<int64_t>& shape, const std::optional<Tensor>& coef,
                    const std::optional<Tensor>& direction, int64_t want) {
  const pc::ReduceOp<T> op(g, shape, coef, direction, want);
  const int64_t in = shape[1], out = shape[0] / groups;
  if (std::min({g.size(0), window.positions, window.inputs, in, out}) == 0) return op.outputs;
  const Tensor x_rows = positions_first<T>(x), g_rows = positions_first<T>(g);
  const Patches<T> patches{
      pc::read<T>(x_rows), pc::read<T>(g_rows), window, in, out, groups, g.size(0), 0};
  const TapsFirst<T> layout{shape[0], in, window.taps};
  const Reduction<T> to = op.pointers();
  const auto buffer = [&](const T* wanted) {
    return pc::Buffer<T>(wanted == nullptr ? 0 : shape[0] * in * window.taps);
  };
  const auto data = [](auto& values) { return values.empty() ? nullptr : values.data(); };
  const pc::Buffer<T> along = layout.from_parameter(to.direction);
  pc::Buffer<T> sum = buffer(to.sum), moment = buffer(to.moment), sign = buffer(to.sign);
  const Reduction<T> inner{to.coef,   data(along),  to.sq_norms, to.dots,
                           data(sum), data(moment), data(sign)};
  const pc::Grid<T> grid(out, window.taps * in);
  pc::run_engine(groups, g.size(0), grid, inner, [&](int64_t group, auto&&... tile) {
    Patches<T> mine = patches;
    mine.group = group;
    run_tile(mine, tile...);
  });
  layout.to_parameter(sum, to.sum);
  layout.to_parameter(moment, to.moment);
  layout.to_parameter(sign, to.sign);
  return op.outputs;
}

Outputs conv_reduce_cpu(const Tensor& x, const Tensor& g, const std::vector<int64_t>& kernel_size,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups,
                        const std::optional<Tensor>& coef, const std::optional<Tensor>& direction,
                        int64_t want) {
  std::vector<int64_t> shape = {g.size(1), x.size(1) / groups};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Window window(x, g, kernel_size, stride, padding, dilation);
  return x.scalar_type() == pc::ScalarType::Double
             ? conv_reduce<double>(x, g, window, groups, shape, coef, direction, want)
             : conv_reduce<float>(x, g, window, groups, shape, coef, direction, want);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("conv_reduce", TORCH_BOX(&conv_reduce_cpu));
}
