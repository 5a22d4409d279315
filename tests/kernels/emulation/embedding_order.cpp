#include "embedding_order.cuh"

#include "binding.h"

namespace pc::tests {

// ids [B * T] in order, with their places.
void embedding_order(const py::array& ids, const py::array& places, const py::array& g,
                     int64_t padding, const char* rule, double k, bool drop, py::array table) {
  const auto run = [&]<typename T>(TypeOf<T>) {
    const Lookups<T> lookups = {
        data<int64_t>(ids), data<int64_t>(places), data<T>(g), ids.size(), g.shape(1), g.shape(2)};
    check(launch_embedding_order(lookups, mutable_data<T>(table), table.shape(0), padding,
                                 g.shape(0), make_order(rule, k, drop), nullptr));
  };
  if (g.itemsize() == sizeof(double)) return run(TypeOf<double>{});
  run(TypeOf<float>{});
}

const Binding embedding_order_binding([](py::module_& m) {
  m.def("embedding_order", embedding_order);
});

}  // namespace pc::tests
