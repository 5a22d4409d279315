#include "binding.h"
#include "row_sq_norms.cuh"

namespace pc::tests {

// Arrays [B, n], not necessarily contiguous, to out [arrays, B].
void row_sq_norms(const py::list& arrays, py::array out) {
  std::vector<py::array> rows;
  for (const py::handle& array : arrays) rows.push_back(array.cast<py::array>());
  with_type(rows[0], [&]<typename T>(TypeOf<T>) {
    Matrices<T> matrices{};
    const int count = static_cast<int>(rows.size());
    for (int i = 0; i < count; ++i) {
      matrices.rows[i] = data<T>(rows[i]);
      matrices.width[i] = rows[i].shape(1);
      matrices.row_stride[i] = rows[i].strides(0) / rows[i].itemsize();
      matrices.column_stride[i] = rows[i].strides(1) / rows[i].itemsize();
    }
    check(launch_row_sq_norms(matrices, count, mutable_data<double>(out), out.shape(1), nullptr));
  });
}

const Binding rows_binding([](py::module_& m) { m.def("row_sq_norms", row_sq_norms); });

}  // namespace pc::tests
