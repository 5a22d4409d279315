// row_sq_norms on CUDA. Its schema and its truth: pycoherence/ops/row_sq_norms.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "binding.h"
#include "row_sq_norms.cuh"

namespace {

using pc::ScalarType;
using pc::Tensor;

// Squared norms for matrices of T; each launch takes up to `most` of them.
template <typename T>
void row_sq_norms(const std::vector<Tensor>& rows, const Tensor& out, cudaStream_t stream) {
  const int64_t many = out.size(0), batch = out.size(1);
  double* to = out.mutable_data_ptr<double>();
  for (int64_t first = 0; first < many; first += pc::Matrices<T>::most) {
    pc::Matrices<T> matrices{};
    const int64_t count = std::min<int64_t>(pc::Matrices<T>::most, many - first);
    for (int64_t i = 0; i < count; ++i) {
      const Tensor& each = rows[first + i];
      matrices.rows[i] = static_cast<const T*>(each.const_data_ptr());
      matrices.width[i] = each.size(1);
      matrices.row_stride[i] = each.stride(0);
      matrices.column_stride[i] = each.stride(1);
    }
    STD_CUDA_CHECK(pc::launch_row_sq_norms(matrices, static_cast<int>(count), to + first * batch,
                                           batch, stream));
  }
}

Tensor row_sq_norms_cuda(std::vector<Tensor> rows) {
  const pc::Gpu gpu(rows[0]);
  const std::vector<int64_t> shape = {static_cast<int64_t>(rows.size()), rows[0].size(0)};
  const Tensor out = torch::stable::new_empty(rows[0], shape, ScalarType::Double);
  switch (rows[0].scalar_type()) {
    case ScalarType::Half:
      row_sq_norms<pc::Half>(rows, out, gpu.stream());
      break;
    case ScalarType::BFloat16:
      row_sq_norms<pc::BFloat16>(rows, out, gpu.stream());
      break;
    case ScalarType::Float:
      row_sq_norms<float>(rows, out, gpu.stream());
      break;
    default:
      row_sq_norms<double>(rows, out, gpu.stream());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CUDA, m) {
  m.impl("row_sq_norms", TORCH_BOX(&row_sq_norms_cuda));
}
