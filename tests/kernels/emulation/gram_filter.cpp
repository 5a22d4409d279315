#include "gram_filter.cuh"

#include "binding.h"

namespace pc::tests {

template <typename T>
void gram_filter(const py::array_t<T>& gram, const py::array_t<bool>& kept, double threshold,
                 py::array_t<T> weights, py::array_t<T> taken) {
  check(launch_gram_filter(gram.data(), kept.data(), threshold, weights.mutable_data(),
                           taken.mutable_data(), gram.shape(0), nullptr));
}

const Binding gram_filter_binding([](py::module_& m) {
  m.def("gram_filter", gram_filter<float>);
  m.def("gram_filter", gram_filter<double>);
});

}  // namespace pc::tests
