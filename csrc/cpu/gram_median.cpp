// gram_median on the CPU. Its schema and its truth: pycoherence/ops/gram_median.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "pc/tensors.h"

namespace {

using pc::Tensor;

// Points that count, in float64, and how far they are from a sum of them.
class Points {
 public:
  template <typename T>
  Points(const T* gram, const bool* kept, int64_t batch) {
    for (int64_t b = 0; b < batch; ++b) {
      if (kept[b]) examples.push_back(b);
    }
    gram_.reserve(size() * size());
    for (const int64_t b : examples) {
      for (const int64_t c : examples) gram_.push_back(gram[b * batch + c]);
    }
    distances.resize(size());
    products_.resize(size());
  }

  int64_t size() const { return static_cast<int64_t>(examples.size()); }

  // Fills `distances` with those from sum_i weights_i p_i, and returns their sum.
  double measure(const std::vector<double>& weights) {
    const int64_t n = size();
    torch::stable::parallel_for(0, n, kRows, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) products_[i] = dot(&gram_[i * n], weights.data(), n);
    });
    const double norm = dot(weights.data(), products_.data(), n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double square = gram_[i * n + i] - 2 * products_[i] + norm;
      distances[i] = square < 0 ? 0 : std::sqrt(square);
      sum += distances[i];
    }
    return sum;
  }

  std::vector<int64_t> examples;
  std::vector<double> distances;

 private:
  static constexpr int64_t kRows = 64;

  // In several sums at once, which the compiler makes a vector of.
  static double dot(const double* a, const double* b, int64_t n) {
    constexpr int64_t kLanes = 8;
    double sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (; i < n; ++i) sums[i % kLanes] += a[i] * b[i];
    double sum = 0;
    for (const double each : sums) sum += each;
    return sum;
  }

  std::vector<double> gram_, products_;
};

template <typename T>
std::tuple<Tensor, Tensor> gram_median(const Tensor& gram, const Tensor& kept, double nu,
                                       double tolerance, int64_t iterations) {
  const Tensor source = pc::prepare<T>(gram), which = torch::stable::contiguous(kept);
  const Tensor out = torch::stable::new_empty(source, {gram.size(0)});
  const Tensor ran = torch::stable::new_empty(source, std::vector<int64_t>{});
  Points points(pc::read<T>(source), pc::read<bool>(which), gram.size(0));
  const int64_t n = points.size();
  std::vector<double> weights(n, 1.0 / static_cast<double>(n));
  double before = points.measure(weights);
  int64_t done = 0;
  while (done < iterations) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double distance = points.distances[i];
      weights[i] = 1 / (distance < nu ? nu : distance);
      sum += weights[i];
    }
    for (double& weight : weights) weight /= sum;
    const double after = points.measure(weights), change = std::abs(before - after);
    const bool enough = change <= tolerance * before;
    before = after;
    ++done;
    if (enough) break;
  }
  T* to = out.mutable_data_ptr<T>();
  std::fill_n(to, gram.size(0), T(0));
  for (int64_t i = 0; i < n; ++i) to[points.examples[i]] = static_cast<T>(weights[i]);
  *ran.mutable_data_ptr<T>() = static_cast<T>(done);
  return {out, ran};
}

std::tuple<Tensor, Tensor> gram_median_cpu(const Tensor& gram, const Tensor& kept, double nu,
                                           double tolerance, int64_t iterations) {
  return gram.scalar_type() == pc::ScalarType::Double
             ? gram_median<double>(gram, kept, nu, tolerance, iterations)
             : gram_median<float>(gram, kept, nu, tolerance, iterations);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("gram_median", TORCH_BOX(&gram_median_cpu));
}
