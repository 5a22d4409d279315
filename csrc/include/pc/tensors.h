// Tensors as the bindings of ops take and make them, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace pc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Bits of `want`, in the order of the outputs.
enum Want : int64_t {
  kSqNorms = 1,
  kDots = 2,
  kWeightedSum = 4,
  kSecondMoment = 8,
  kSignSum = 16,
  kSumDots = 32,
  kGram = 64
};

template <typename T>
constexpr ScalarType kDtype = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

// The function of torch::stable looks up an operator by its name, which takes longer than a small
// kernel; these two call torch directly, or not at all.
template <typename T>
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size) {
  int32_t dtype =
      sizeof(T) == sizeof(double) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.data(),
                                                   static_cast<int64_t>(size.size()), &dtype,
                                                   nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// The tensor in the dtype T, contiguous; itself if it is so already.
template <typename T>
inline Tensor prepare(const Tensor& x) {
  return as_contiguous(x.scalar_type() == kDtype<T> ? x : torch::stable::to(x, kDtype<T>));
}

// Ids in int64, contiguous.
inline Tensor prepare_ids(const Tensor& ids) {
  return as_contiguous(
      ids.scalar_type() == ScalarType::Long ? ids : torch::stable::to(ids, ScalarType::Long));
}

template <typename T>
inline const T* read(const Tensor& x) {
  return x.const_data_ptr<T>();
}

// The outputs of a *_reduce op, without values yet; where not wanted undefined, which is None in
// Python.
template <typename T>
inline Outputs new_outputs(const Tensor& g, const std::vector<int64_t>& shape, int64_t want) {
  const Tensor none;
  const auto output = [&](int64_t flag, const std::vector<int64_t>& size) {
    return want & flag ? new_empty<T>(g, size) : none;
  };
  const std::vector<int64_t> batch = {g.size(0)};
  return {output(kSqNorms, batch),
          output(kDots, batch),
          output(kWeightedSum, shape),
          output(kSecondMoment, shape),
          output(kSignSum, shape),
          output(kSumDots, batch),
          output(kGram, {batch[0], batch[0]})};
}

// Sums of nothing.
inline Outputs zeros(const Outputs& outputs) {
  const auto clear = [](Tensor output) {
    if (output.defined()) torch::stable::zero_(output);
  };
  std::apply([&](const auto&... output) { (clear(output), ...); }, outputs);
  return outputs;
}

}  // namespace pc
