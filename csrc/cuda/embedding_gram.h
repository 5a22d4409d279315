// The Gram of lookups, as the ops that give one take it.
#pragma once

#include <cstdint>
#include <optional>

#include "pc/tensors.h"

namespace pc {

// Like the op embedding_gram, for ids below `rows`.
Tensor embedding_gram(const Tensor& ids1, const Tensor& g1, const std::optional<Tensor>& ids2,
                      const std::optional<Tensor>& g2, int64_t padding_idx, int64_t rows);

}  // namespace pc
