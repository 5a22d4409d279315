// embedding_gram on the CPU. Its schema and its truth: pycoherence/ops/embedding_gram.py.

#include <stdexcept>
#include <string>

#include "gram_op.h"
#include "lookup_gram.h"
#include "lookups.h"

namespace {

using pc::Tensor;

// The lookups of a batch, in the order of the ids.
inline pc::Lookups sorted_lookups(const Tensor& ids, int64_t padding_idx) {
  const Tensor wide = pc::prepare_ids(ids);
  const int64_t* found = wide.const_data_ptr<int64_t>();
  const auto [low, high] = pc::id_bounds(found, wide.numel());
  if (low < 0) {
    throw std::out_of_range("embedding_gram: expected ids >= 0, got " + std::to_string(low));
  }
  return {found, ids.size(0), ids.size(1), padding_idx, high};
}

// It, and the rows of its gradients.
template <typename T>
struct Batch {
  Batch(const Tensor& ids, const Tensor& g, int64_t padding_idx)
      : g(pc::prepare<T>(g)),
        lookups(sorted_lookups(ids, padding_idx)),
        rows(lookups, pc::read<T>(this->g), g.size(2)) {}
  Batch(const Batch&) = delete;

  Tensor g;
  pc::Lookups lookups;
  pc::LookupRows<T> rows;
};

template <typename T>
Tensor embedding_gram(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
                      const std::optional<Tensor>& g2, int64_t padding_idx) {
  const Tensor out = pc::new_gram<T>(g1, g2);
  T* gram = out.mutable_data_ptr<T>();
  Batch<T> one(ids1, g1, padding_idx);
  if (!g2) {
    pc::lookup_gram(one.rows, one.rows, true, gram);
    pc::mirror(gram, g1.size(0));
    return out;
  }
  Batch<T> two(*ids2, *g2, padding_idx);
  pc::lookup_gram(one.rows, two.rows, false, gram);
  return out;
}

Tensor embedding_gram_cpu(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
                          const std::optional<Tensor>& g2, int64_t padding_idx) {
  return g1.scalar_type() == pc::ScalarType::Double
             ? embedding_gram<double>(ids1, g1, ids2, g2, padding_idx)
             : embedding_gram<float>(ids1, g1, ids2, g2, padding_idx);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("embedding_gram", TORCH_BOX(&embedding_gram_cpu));
}
