// For files of bindings: each says what it adds to the module, and none is listed anywhere.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "pc/device.cuh"

namespace pc::tests {

namespace py = pybind11;
using Binder = void (*)(py::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

// A static one of these adds to the module.
struct Binding {
  explicit Binding(Binder binder) { binders().push_back(binder); }
};

template <typename T>
struct TypeOf {
  using type = T;
};

// Calls f with the TypeOf of the array's numbers; numpy knows bfloat16 as uint16 only.
template <typename F>
auto with_type(const py::array& array, const F& f) {
  const int64_t bytes = array.itemsize();
  if (array.dtype().kind() == 'f' && bytes == 8) return f(TypeOf<double>{});
  if (array.dtype().kind() == 'f' && bytes == 4) return f(TypeOf<float>{});
  if (array.dtype().kind() == 'f' && bytes == 2) return f(TypeOf<Half>{});
  if (array.dtype().kind() == 'u' && bytes == 2) return f(TypeOf<BFloat16>{});
  throw py::type_error("expected float64, float32, float16, or uint16 for bfloat16");
}

template <typename T>
const T* data(const py::array& array) {
  return static_cast<const T*>(array.data());
}

template <typename T>
T* mutable_data(py::array& array) {
  return static_cast<T*>(array.mutable_data());
}

// Throws unless a launch succeeded.
inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw py::value_error("launch: error " + std::to_string(status));
}

}  // namespace pc::tests
