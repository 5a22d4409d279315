#include "gram_median.cuh"

#include "binding.h"

namespace pc::tests {

template <typename T>
void gram_median(const py::array_t<T>& gram, const py::array_t<bool>& kept, double nu,
                 double tolerance, int64_t iterations, py::array_t<T> out, py::array_t<T> ran) {
  check(launch_gram_median(gram.data(), kept.data(), out.mutable_data(), ran.mutable_data(),
                           gram.shape(0), nu, tolerance, iterations, nullptr));
}

const Binding gram_median_binding([](py::module_& m) {
  m.def("gram_median", gram_median<float>);
  m.def("gram_median", gram_median<double>);
});

}  // namespace pc::tests
