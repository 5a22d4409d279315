#include "drive.h"
#include "identity.cuh"

namespace pc::tests {

const Driven driven("identity", [] {
  const auto x = numbers<float>(1000);
  std::vector<float> out(x.size());
  launch_identity(x.data(), out.data(), static_cast<int64_t>(x.size()), nullptr);
});

}  // namespace pc::tests
