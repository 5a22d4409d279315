// embedding_gram on CUDA. Its schema and its truth: pycoherence/ops/embedding_gram.py.

#include "binding.h"
#include "embedding_gram.cuh"
#include "embedding_gram.h"
#include "workspace.h"

namespace {

using pc::Tensor;

// A batch as kernels take it, each example's ids in order.
template <typename scalar_t>
struct Batch {
  Batch(const Tensor& ids, const Tensor& g)
      : g(torch::stable::contiguous(g)), sorted(pc::sort(pc::prepare_ids(ids))) {}

  pc::ExampleLookups<scalar_t> lookups() const {
    return {sorted.first.const_data_ptr<int64_t>(),
            sorted.second.const_data_ptr<int64_t>(),
            static_cast<const scalar_t*>(g.const_data_ptr()),
            g.size(0),
            g.size(1),
            g.size(2)};
  }

  Tensor g;
  std::pair<Tensor, Tensor> sorted;
};

template <typename scalar_t>
Tensor gram(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
            const std::optional<Tensor>& g2, int64_t padding_idx, int64_t rows) {
  using T = pc::SumOf<scalar_t>;
  const pc::Gpu gpu(g1);
  Tensor out = torch::stable::new_empty(g1, {g1.size(0), (g2 ? *g2 : g1).size(0)}, pc::kDtype<T>);
  if (g1.numel() == 0 || (g2 && g2->numel() == 0)) return torch::stable::zero_(out);
  const Batch<scalar_t> first(ids1, g1);
  const std::optional<Batch<scalar_t>> second =
      g2 ? std::optional<Batch<scalar_t>>(std::in_place, *ids2, *g2) : std::nullopt;
  const pc::ExampleLookups<scalar_t> one = first.lookups();
  const pc::ExampleLookups<scalar_t> two = second ? second->lookups() : one;
  const int64_t count = ids1.numel() + (g2 ? ids2->numel() : 0);
  const int64_t columns = pc::gram_columns<T>(count, one.width, pc::workspace);
  const Tensor sums = torch::stable::new_empty(g1, {count * columns}, pc::kDtype<T>);
  STD_CUDA_CHECK(pc::launch_embedding_gram(one, second ? &two : nullptr, rows, padding_idx, columns,
                                           sums.mutable_data_ptr<T>(), out.mutable_data_ptr<T>(),
                                           gpu.stream()));
  return out;
}

Tensor embedding_gram_cuda(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
                           const std::optional<Tensor>& g2, int64_t padding_idx) {
  return pc::embedding_gram(ids1, g1, ids2, g2, padding_idx, INT64_MAX);
}

void set_cuda_workspace(int64_t bytes) { pc::workspace = bytes; }

}  // namespace

Tensor pc::embedding_gram(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
                          const std::optional<Tensor>& g2, int64_t padding_idx, int64_t rows) {
  return with_type(
      g1, [&](auto zero) { return gram<decltype(zero)>(ids1, g1, ids2, g2, padding_idx, rows); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pycoherence_native, m) {
  m.def("set_cuda_workspace(int bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CompositeExplicitAutograd, m) {
  m.impl("set_cuda_workspace", TORCH_BOX(&set_cuda_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("embedding_gram", TORCH_BOX(&embedding_gram_cuda));
}
