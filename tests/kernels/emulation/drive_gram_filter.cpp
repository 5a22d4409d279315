#include <memory>

#include "drive.h"
#include "gram_filter.cuh"

namespace pc::tests {

const Driven driven("gram_filter", [] {
  constexpr int B = 37;
  const auto rows = numbers<float>(B);
  std::vector<float> gram, out(B), taken(B);
  for (const float a : rows) {
    for (const float b : rows) gram.push_back(a * b);
  }
  const std::unique_ptr<bool[]> kept(new bool[B]);
  for (int b = 0; b < B; ++b) kept[b] = b % 5 != 3;
  launch_gram_filter(gram.data(), kept.get(), 0.9, out.data(), taken.data(), B, nullptr);
});

}  // namespace pc::tests
