#include "drive.h"
#include "samples.cuh"

namespace pc::tests {

template <Plant plant>
void sum() {
  constexpr int64_t B = 2, size = 150;
  const auto x = numbers<float>(B * size);
  std::vector<float> out(B);
  launch_sum<plant>(x.data(), out.data(), B, size, nullptr);
}

const Driven driven[] = {
    {"sum", sum<Plant::none>},
    {"planted_no_sync", sum<Plant::no_sync>},
    {"planted_outside", sum<Plant::outside>},
    {"planted_outside_shared", sum<Plant::outside_shared>},
};

}  // namespace pc::tests
