// Code that the bindings of the *_gram ops share.
#pragma once

#include <cstdint>
#include <optional>

#include "reduce_op.h"

namespace pc {

// [B1, B2] without values yet; a batch with itself if there is no second one.
template <typename T>
inline Tensor new_gram(const Tensor& one, const std::optional<Tensor>& two) {
  return new_empty<T>(one, {one.size(0), (two ? *two : one).size(0)});
}

inline Tensor zeros(Tensor gram) { return torch::stable::zero_(gram); }

}  // namespace pc
