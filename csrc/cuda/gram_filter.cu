// gram_filter on CUDA. Its schema and its truth: pycoherence/ops/gram_filter.py.

#include "binding.h"
#include "gram_filter.cuh"

namespace {

using pc::Tensor;

template <typename T>
std::tuple<Tensor, Tensor> gram_filter(const Tensor& gram, const Tensor& kept, double threshold) {
  const pc::Gpu gpu(gram);
  const Tensor source = pc::prepare<T>(gram), which = torch::stable::contiguous(kept);
  const Tensor weights = torch::stable::new_empty(source, {gram.size(0)});
  const Tensor taken = torch::stable::new_empty(source, {gram.size(0)});
  STD_CUDA_CHECK(pc::launch_gram_filter(pc::read<T>(source), pc::read<bool>(which), threshold,
                                        weights.mutable_data_ptr<T>(), taken.mutable_data_ptr<T>(),
                                        gram.size(0), gpu.stream()));
  return {weights, taken};
}

std::tuple<Tensor, Tensor> gram_filter_cuda(const Tensor& gram, const Tensor& kept,
                                            double threshold) {
  return gram.scalar_type() == pc::ScalarType::Double ? gram_filter<double>(gram, kept, threshold)
                                                      : gram_filter<float>(gram, kept, threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("gram_filter", TORCH_BOX(&gram_filter_cuda));
}
