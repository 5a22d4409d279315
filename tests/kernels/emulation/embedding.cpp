#include "binding.h"
#include "embedding_gram.cuh"
#include "embedding_reduce.cuh"

namespace pc::tests {

// Null for None.
template <typename T>
T* pointer(const py::object& array) {
  return array.is_none() ? nullptr : static_cast<T*>(py::cast<py::array>(array).mutable_data());
}

template <typename scalar_t>
Lookups<scalar_t> lookups(const py::array& ids, const py::object& places, const py::array& g) {
  return {data<int64_t>(ids), pointer<int64_t>(places), data<scalar_t>(g), ids.size(), g.shape(1),
          g.shape(2)};
}

// ids [B * T], as they are or in order with their places; out: sq_norms, dots, weighted_sum,
// second_moment, sign_sum, sum_dots.
void embedding_reduce(const py::array& ids, const py::object& places, const py::array& g,
                      int64_t rows, int64_t padding, const py::object& coef,
                      const py::object& direction, const py::list& out) {
  with_type(g, [&]<typename scalar_t>(TypeOf<scalar_t>) {
    using T = SumOf<scalar_t>;
    const auto in = lookups<scalar_t>(ids, places, g);
    const TableReduction<T> to = {
        rows,
        padding,
        pointer<T>(coef),
        pointer<T>(direction),
        pointer<T>(out[0]),
        pointer<T>(out[1]),
        pointer<T>(out[2]),
        pointer<T>(out[3]),
        pointer<T>(out[4]),
        pointer<T>(out[5]),
    };
    std::vector<T> parts(parts_of(in, to));
    check(launch_embedding_reduce(in, to, parts.data(), nullptr));
  });
}

template <typename scalar_t>
ExampleLookups<scalar_t> example_lookups(const py::array& ids, const py::array& places,
                                         const py::array& g) {
  return {data<int64_t>(ids), data<int64_t>(places), data<scalar_t>(g), g.shape(0), g.shape(1),
          g.shape(2)};
}

// ids [B, T], in order in each example with their places; the second batch None or as the first.
void embedding_gram(const py::array& ids, const py::array& places, const py::array& g,
                    const py::object& second, int64_t rows, int64_t padding, int64_t workspace,
                    py::array out) {
  with_type(g, [&]<typename scalar_t>(TypeOf<scalar_t>) {
    using T = SumOf<scalar_t>;
    const auto one = example_lookups<scalar_t>(ids, places, g);
    ExampleLookups<scalar_t> two = {};
    if (!second.is_none()) {
      const py::tuple batch = second;
      two = example_lookups<scalar_t>(batch[0], batch[1], batch[2]);
    }
    const int64_t lookups = one.batch * one.positions + two.batch * two.positions;
    const int64_t columns = gram_columns<T>(lookups, one.width, workspace);
    std::vector<T> sums(lookups * columns);
    check(launch_embedding_gram(one, second.is_none() ? nullptr : &two, rows, padding, columns,
                                sums.data(), mutable_data<T>(out), nullptr));
  });
}

const Binding embedding_binding([](py::module_& m) {
  m.def("embedding_reduce", embedding_reduce);
  m.def("embedding_gram", embedding_gram);
});

}  // namespace pc::tests
