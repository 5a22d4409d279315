#include "drive.h"
#include "row_sq_norms.cuh"

namespace pc::tests {

const Driven rows_driven("row_sq_norms", [] {
  constexpr int64_t batch = 9, widths[] = {1, 40, 9000};
  std::vector<std::vector<float>> rows;
  Matrices<float> matrices{};
  for (int i = 0; i < 3; ++i) {
    rows.push_back(numbers<float>(batch * widths[i]));
    matrices.rows[i] = rows[i].data();
    matrices.width[i] = matrices.row_stride[i] = widths[i];
    matrices.column_stride[i] = 1;
  }
  std::vector<double> out(3 * batch);
  launch_row_sq_norms(matrices, 3, out.data(), batch, nullptr);
});

}  // namespace pc::tests
