// The template op on CUDA, a contiguous copy: pycoherence_native::identity(Tensor x) -> Tensor.
// To add a kernel, copy this file and identity.cuh; setup.py builds whatever lies here.

#include <torch/headeronly/core/Dispatch_v2.h>

#include "binding.h"
#include "identity.cuh"

namespace {

using pc::ScalarType;
using pc::Tensor;

Tensor identity_cuda(const Tensor& x) {
  const pc::Gpu gpu(x);
  const Tensor source = torch::stable::contiguous(x);
  const Tensor out = torch::stable::empty_like(source);
  THO_DISPATCH_V2(x.scalar_type(), "identity", AT_WRAP([&] {
                    STD_CUDA_CHECK(pc::launch_identity(source.const_data_ptr<scalar_t>(),
                                                       out.mutable_data_ptr<scalar_t>(),
                                                       source.numel(), gpu.stream()));
                  }),
                  AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("identity", TORCH_BOX(&identity_cuda));
}
