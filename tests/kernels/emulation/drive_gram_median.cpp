#include <memory>

#include "drive.h"
#include "gram_median.cuh"

namespace pc::tests {

const Driven driven("gram_median", [] {
  constexpr int B = 37;
  const auto rows = numbers<float>(B);
  std::vector<float> gram, out(B), ran(1);
  for (const float a : rows) {
    for (const float b : rows) gram.push_back(a * b);
  }
  const std::unique_ptr<bool[]> kept(new bool[B]);
  for (int b = 0; b < B; ++b) kept[b] = b % 5 != 3;
  launch_gram_median(gram.data(), kept.get(), out.data(), ran.data(), B, 1e-3, 0.0, 3, nullptr);
});

}  // namespace pc::tests
