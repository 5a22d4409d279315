// The module of the emulated kernels: launchers over contiguous numpy arrays.

#include "binding.h"

PYBIND11_MODULE(emulation, m) {
  // Of blocks: 0 forward, 1 reversed, 2 shuffled.
  m.def("set_order",
        [](int order) { pc::emulation::order = static_cast<pc::emulation::Order>(order); });
  for (const auto bind : pc::tests::binders()) bind(m);
}
