#include "binding.h"
#include "dense_order.cuh"
#include "linear_order.cuh"

namespace pc::tests {

// In the dtype of the sums, as the ops call them.
template <typename F>
void with_sums(const py::array& array, const F& f) {
  if (array.itemsize() == 8) return f(TypeOf<double>{});
  f(TypeOf<float>{});
}

void dense_order(const py::array& rows, const char* rule, double k, bool drop, py::array out) {
  with_sums(rows, [&]<typename T>(TypeOf<T>) {
    check(launch_dense_order(data<T>(rows), mutable_data<T>(out), rows.shape(0), rows.shape(1),
                             make_order(rule, k, drop), nullptr));
  });
}

void linear_order(const py::array& x, const py::array& g, const char* rule, double k, bool drop,
                  py::array out) {
  with_sums(x, [&]<typename T>(TypeOf<T>) {
    check(launch_linear_order(data<T>(x), data<T>(g), mutable_data<T>(out), x.shape(0), x.shape(1),
                              g.shape(1), make_order(rule, k, drop), nullptr));
  });
}

const Binding order_binding([](py::module_& m) {
  m.def("dense_order", dense_order);
  m.def("linear_order", linear_order);
});

}  // namespace pc::tests
