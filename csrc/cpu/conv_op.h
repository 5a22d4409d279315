// Code that the bindings of conv_reduce and conv_gram share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv.h"
#include "reduce_op.h"

namespace pc {

struct ConvOptions {
  const std::vector<int64_t>&kernel_size, &stride, &padding, &dilation;
  int64_t groups;
};

// One batch of a convolution's inputs x [B, I, *S] and output gradients g [B, O, *S_out]. Patches
// point into it.
template <typename T>
class ConvBatch {
 public:
  ConvBatch(const Tensor& x, const Tensor& g, const ConvOptions& options)
      : x_(x),
        g_(g),
        window_(sizes(x), sizes(g), options.kernel_size, options.stride, options.padding,
                options.dilation),
        groups_(options.groups) {}
  ConvBatch(const ConvBatch&) = delete;

  bool empty() const { return x_.maps.numel() == 0 || g_.maps.numel() == 0; }

  Patches<T> patches() const { return {x_.read(), g_.read(), window_, x_.maps.size(0), groups_}; }

 private:
  // [B, C, *S] as [B, C, S], or as [B, S, C] what is channels_last in memory.
  struct Flat {
    explicit Flat(const Tensor& x) : maps(torch::stable::flatten(x, 2, -1)) {
      const Tensor turned = torch::stable::transpose(maps, 1, 2);
      channels_last = turned.is_contiguous();
      maps = prepare<T>(channels_last ? turned : maps);
    }

    Maps<T> read() const {
      return {pc::read<T>(maps), maps.size(channels_last ? 2 : 1), maps.size(channels_last ? 1 : 2),
              channels_last};
    }

    Tensor maps;
    bool channels_last;
  };

  static std::vector<int64_t> sizes(const Tensor& x) {
    std::vector<int64_t> result;
    for (int64_t d = 2; d < x.dim(); ++d) result.push_back(x.size(d));
    return result;
  }

  Flat x_, g_;
  Window window_;
  int64_t groups_;
};

}  // namespace pc
