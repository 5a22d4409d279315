// The template op on the CPU, a contiguous copy: pycoherence_native::identity(Tensor x) -> Tensor.
// To add a kernel, copy this file; setup.py builds whatever lies here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The blocks are the same for any number of threads, and so are the results of kernels that add up.
constexpr int64_t kBlock = int64_t{1} << 14;

// x, out: [size]
template <typename scalar_t>
void identity_kernel(const scalar_t* x, scalar_t* out, int64_t size) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min((block + 1) * kBlock, size);
      for (int64_t i = block * kBlock; i < end; ++i) {
        out[i] = x[i];
      }
    }
  });
}

Tensor identity_cpu(const Tensor& x) {
  const Tensor source = torch::stable::contiguous(x);
  const Tensor out = torch::stable::empty_like(source);
  THO_DISPATCH_V2(x.scalar_type(), "identity", AT_WRAP([&] {
                    identity_kernel(source.const_data_ptr<scalar_t>(),
                                    out.mutable_data_ptr<scalar_t>(), source.numel());
                  }),
                  AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("identity", TORCH_BOX(&identity_cpu));
}
