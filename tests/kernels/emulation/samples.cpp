#include "samples.cuh"

#include "binding.h"

namespace pc::tests {

template <Plant plant>
void sum(const py::array_t<float>& x, py::array_t<float> out) {
  check(launch_sum<plant>(x.data(), out.mutable_data(), x.shape(0), x.shape(1), nullptr));
}

template <typename T>
void lanes(const py::array_t<T>& x, py::array_t<T> out, py::array_t<int> negative, int mask) {
  check(launch(lanes_kernel<T>, 1, static_cast<int>(x.size()), 0, nullptr, x.data(),
               out.mutable_data(), negative.mutable_data(), mask));
}

void votes(const py::array_t<float>& x, py::array_t<uint32_t> which, py::array_t<float> first) {
  check(launch(votes_kernel, 1, static_cast<int>(x.size()), 0, nullptr, x.data(),
               which.mutable_data(), first.mutable_data()));
}

// Of halves, or of bfloat16.
template <typename F>
void with_half(const py::array& array, const F& f) {
  if (array.dtype().kind() == 'u') return f(TypeOf<BFloat16>{});
  f(TypeOf<Half>{});
}

void mma(const py::array& a, const py::array& b, py::array_t<float> out) {
  with_half(a, [&]<typename T>(TypeOf<T>) {
    check(launch(mma_kernel<T>, 1, 32, 0, nullptr, data<T>(a), data<T>(b), out.mutable_data()));
  });
}

void to_float(const py::array& x, py::array_t<float> out) {
  with_half(x, [&]<typename T>(TypeOf<T>) {
    check(launch(to_float_kernel<T>, 2, 64, 0, nullptr, data<T>(x), out.mutable_data(), x.size()));
  });
}

const Binding binding([](py::module_& m) {
  m.def("sum", sum<Plant::none>);
  m.def("sum_no_wait", sum<Plant::no_wait>);
  m.def("sum_some_end", sum<Plant::some_end>);
  m.def("sum_other_line", sum<Plant::other_line>);
  m.def("sum_order", sum<Plant::order>);
  m.def("lanes", lanes<float>);
  m.def("lanes", lanes<double>);
  m.def("votes", votes);
  m.def("mma", mma);
  m.def("to_float", to_float);
});

}  // namespace pc::tests
