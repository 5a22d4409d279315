// gram_filter on the CPU. Its schema and its truth: pycoherence/ops/gram_filter.py.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "pc/tensors.h"

namespace {

using pc::Tensor;

// gram: [B, B], kept: [B], weights, taken: [B], zeros
template <typename T>
void filter(const T* gram, const bool* kept, double threshold, T* weights, T* taken, int64_t B) {
  int64_t first = 0, agree = 0;
  while (first < B && !kept[first]) ++first;
  if (first == B) return;
  // Dot products with the average, and its own norm.
  std::vector<double> products(gram + first * B, gram + (first + 1) * B);
  const auto norm_of = [&](int64_t b) { return std::sqrt(static_cast<double>(gram[b * B + b])); };
  double sq_norm = norm_of(first) * norm_of(first);
  taken[first] = 1;
  for (int64_t b = first + 1; b < B; ++b) {
    if (!kept[b]) continue;
    const double norm = norm_of(b), product = products[b], scale = std::sqrt(sq_norm) * norm;
    if (!(1 - (scale == 0 ? 0 : product / scale) <= threshold)) continue;
    for (int64_t i = b + 1; i < B; ++i) products[i] = (products[i] + gram[b * B + i]) / 2;
    sq_norm = (sq_norm + 2 * product + norm * norm) / 4;
    taken[b] = 1;
    ++agree;
  }
  if (agree == 0) taken[first] = 0;
  double weight = 1;
  for (int64_t b = B - 1; b >= 0; --b) {
    if (taken[b] == 0) continue;
    if (b > first) weight /= 2;
    weights[b] = static_cast<T>(weight);
  }
}

template <typename T>
std::tuple<Tensor, Tensor> gram_filter(const Tensor& gram, const Tensor& kept, double threshold) {
  const Tensor source = pc::prepare<T>(gram), which = torch::stable::contiguous(kept);
  Tensor weights = torch::stable::new_empty(source, {gram.size(0)});
  Tensor taken = torch::stable::new_empty(source, {gram.size(0)});
  torch::stable::zero_(weights);
  torch::stable::zero_(taken);
  filter(pc::read<T>(source), pc::read<bool>(which), threshold, weights.mutable_data_ptr<T>(),
         taken.mutable_data_ptr<T>(), gram.size(0));
  return {weights, taken};
}

std::tuple<Tensor, Tensor> gram_filter_cpu(const Tensor& gram, const Tensor& kept,
                                           double threshold) {
  return gram.scalar_type() == pc::ScalarType::Double ? gram_filter<double>(gram, kept, threshold)
                                                      : gram_filter<float>(gram, kept, threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("gram_filter", TORCH_BOX(&gram_filter_cpu));
}
