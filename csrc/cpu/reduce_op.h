// Code that the bindings of the *_reduce ops share: their outputs, and where these lie.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "pc/tensors.h"
#include "reduction.h"

namespace pc {

// The outputs of an op, without values yet, undefined where not wanted, and the inputs that all ops
// have in common.
template <typename T>
struct ReduceOp {
  ReduceOp(const Tensor& g, const std::vector<int64_t>& shape, const std::optional<Tensor>& coef,
           const std::optional<Tensor>& direction, int64_t want)
      : want(want), outputs(new_outputs<T>(g, shape, want)) {
    if (coef) weights = prepare<T>(*coef);
    if (direction) along = prepare<T>(*direction);
  }

  Reduction<T> pointers() const {
    const auto write = [&](const Tensor& to, int64_t flag) {
      return want & flag ? to.mutable_data_ptr<T>() : nullptr;
    };
    return {weights ? read<T>(*weights) : nullptr,     along ? read<T>(*along) : nullptr,
            write(std::get<0>(outputs), kSqNorms),     write(std::get<1>(outputs), kDots),
            write(std::get<2>(outputs), kWeightedSum), write(std::get<3>(outputs), kSecondMoment),
            write(std::get<4>(outputs), kSignSum),     write(std::get<5>(outputs), kSumDots),
            write(std::get<6>(outputs), kGram)};
  }

  int64_t want;
  Outputs outputs;
  std::optional<Tensor> weights;
  std::optional<Tensor> along;
};

}  // namespace pc
