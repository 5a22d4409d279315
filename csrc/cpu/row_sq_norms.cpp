// row_sq_norms on the CPU. Its schema and its truth: pycoherence/ops/row_sq_norms.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pc/tensors.h"
#include "pc/vector.h"

namespace {

using pc::Tensor;

// Once more in double where the squares may have left the range of T.
template <typename Machine, typename T>
PC_INLINE double sq_norm(const T* row, int64_t size) {
  const double norm = pc::dot<Machine>(row, row, size);
  const bool safe = sizeof(T) == sizeof(double) || (norm > 1e-30 && norm < 1e30);
  return safe ? norm : pc::exact_dot(row, row, size);
}

// rows [batch, size] to out [batch]
template <typename T>
void sq_norms(const Tensor& rows, double* out) {
  const bool there = rows.scalar_type() == pc::kDtype<T> && rows.stride(1) == 1;
  const Tensor readable = there ? rows : pc::prepare<T>(rows);
  const T* data = pc::read<T>(readable);
  const int64_t size = rows.size(1), stride = readable.stride(0);
  const int64_t grain = 1 + 16384 / (size + 1);
  torch::stable::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto machine) PC_INLINED {
      for (int64_t b = begin; b < end; ++b) {
        out[b] = sq_norm<decltype(machine)>(data + b * stride, size);
      }
    });
  });
}

Tensor row_sq_norms_cpu(std::vector<Tensor> rows) {
  const int64_t many = static_cast<int64_t>(rows.size()), batch = rows[0].size(0);
  const Tensor out = pc::new_empty<double>(rows[0], {many, batch});
  double* to = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < many; ++i) {
    if (rows[i].numel() == 0) {
      std::fill_n(to + i * batch, batch, 0.0);
    } else if (rows[i].scalar_type() == pc::ScalarType::Double) {
      sq_norms<double>(rows[i], to + i * batch);
    } else {
      sq_norms<float>(rows[i], to + i * batch);
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("row_sq_norms", TORCH_BOX(&row_sq_norms_cpu));
}
