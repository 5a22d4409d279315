// gram_median on CUDA. Its schema and its truth: pycoherence/ops/gram_median.py.

#include "binding.h"
#include "gram_median.cuh"

namespace {

using pc::Tensor;

template <typename T>
std::tuple<Tensor, Tensor> gram_median(const Tensor& gram, const Tensor& kept, double nu,
                                       double tolerance, int64_t iterations) {
  const pc::Gpu gpu(gram);
  const Tensor source = pc::prepare<T>(gram), which = torch::stable::contiguous(kept);
  const Tensor out = torch::stable::new_empty(source, {gram.size(0)});
  const Tensor ran = torch::stable::new_empty(source, std::vector<int64_t>{});
  STD_CUDA_CHECK(pc::launch_gram_median(pc::read<T>(source), pc::read<bool>(which),
                                        out.mutable_data_ptr<T>(), ran.mutable_data_ptr<T>(),
                                        gram.size(0), nu, tolerance, iterations, gpu.stream()));
  return {out, ran};
}

std::tuple<Tensor, Tensor> gram_median_cuda(const Tensor& gram, const Tensor& kept, double nu,
                                            double tolerance, int64_t iterations) {
  return gram.scalar_type() == pc::ScalarType::Double
             ? gram_median<double>(gram, kept, nu, tolerance, iterations)
             : gram_median<float>(gram, kept, nu, tolerance, iterations);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("gram_median", TORCH_BOX(&gram_median_cuda));
}
