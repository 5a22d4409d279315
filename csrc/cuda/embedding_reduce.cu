// embedding_reduce on CUDA. Its schema and its truth: pycoherence/ops/embedding_reduce.py.

#include "binding.h"
#include "embedding_gram.h"
#include "embedding_reduce.cuh"

namespace {

using pc::Outputs;
using pc::Tensor;

// All outputs but the Gram.
template <typename scalar_t, typename T>
void reduce(const Tensor& ids, const Tensor& g, const pc::TableReduction<T>& to,
            cudaStream_t stream) {
  const Tensor rows = torch::stable::contiguous(g), wide = pc::prepare_ids(ids);
  pc::Lookups<scalar_t> in = {wide.const_data_ptr<int64_t>(),
                              nullptr,
                              static_cast<const scalar_t*>(rows.const_data_ptr()),
                              ids.numel(),
                              g.size(1),
                              g.size(2)};
  std::optional<std::pair<Tensor, Tensor>> sorted;
  if (!pc::needs_no_order(to, in.positions)) {
    sorted = pc::sort(torch::stable::flatten(wide));
    in.ids = sorted->first.const_data_ptr<int64_t>();
    in.places = sorted->second.const_data_ptr<int64_t>();
  }
  const Tensor parts = torch::stable::new_zeros(g, {pc::parts_of(in, to)}, pc::kDtype<T>);
  STD_CUDA_CHECK(pc::launch_embedding_reduce(in, to, parts.mutable_data_ptr<T>(), stream));
}

template <typename scalar_t>
Outputs embedding_reduce(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                         int64_t padding_idx, const std::optional<Tensor>& coef,
                         const std::optional<Tensor>& direction, int64_t want) {
  using T = pc::SumOf<scalar_t>;
  const pc::Gpu gpu(g);
  Outputs outputs = pc::new_outputs<T>(g, {num_embeddings, g.size(2)}, want);
  if (g.numel() == 0) return pc::zeros(outputs);
  std::optional<Tensor> weights, along;
  if (coef) weights = pc::prepare<T>(*coef);
  if (direction) along = pc::prepare<T>(*direction);
  const auto output = [&](Tensor& to, int64_t flag) {
    return want & flag ? to.mutable_data_ptr<T>() : nullptr;
  };
  // Only rows that are looked up are written.
  const auto table = [&](Tensor& to, int64_t flag) {
    if (want & flag) to = torch::stable::zero_(to);
    return output(to, flag);
  };
  auto& [sq_norms, dots, weighted_sum, second_moment, sign_sum, sum_dots, gram] = outputs;
  const pc::TableReduction<T> to = {num_embeddings,
                                    padding_idx,
                                    weights ? pc::read<T>(*weights) : nullptr,
                                    along ? pc::read<T>(*along) : nullptr,
                                    output(sq_norms, pc::kSqNorms),
                                    output(dots, pc::kDots),
                                    table(weighted_sum, pc::kWeightedSum),
                                    table(second_moment, pc::kSecondMoment),
                                    table(sign_sum, pc::kSignSum),
                                    output(sum_dots, pc::kSumDots)};
  if (to.any()) reduce<scalar_t>(ids, g, to, gpu.stream());
  if (want & pc::kGram) {
    gram = pc::embedding_gram(ids, g, std::nullopt, std::nullopt, padding_idx, num_embeddings);
  }
  return outputs;
}

Outputs embedding_reduce_cuda(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                              int64_t padding_idx, const std::optional<Tensor>& coef,
                              const std::optional<Tensor>& direction, int64_t want) {
  return pc::with_type(g, [&](auto zero) {
    return embedding_reduce<decltype(zero)>(ids, g, num_embeddings, padding_idx, coef, direction,
                                            want);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("embedding_reduce", TORCH_BOX(&embedding_reduce_cuda));
}
