// Which way the gradients of a weight are reduced: a cost model, in multiply-adds of one number as
// the widest vectors do them. It sees shapes and what is wanted, nothing that was measured.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "reduction.h"
#include "workspace.h"

namespace pc {

// To add up the lanes of two dot products.
constexpr double kDotEnd = 800;

struct Plan {
  bool ghost_norms = false;  // squared norms by products of Grams
  bool ghost_gram = false;   // the Gram, and dots with the sum, likewise
  bool plain_sum = false;    // the sum as one product of matrices, past example boundaries
  bool plain_dots = false;   // dots with a direction from its products with the rows of x
};

// The outputs of `to` that are left to the tile engine.
template <typename T>
Reduction<T> left_over(const Plan& plan, Reduction<T> to) {
  if (plan.ghost_norms) to.sq_norms = nullptr;
  if (plan.ghost_gram) to.gram = to.sum_dots = nullptr;
  if (plan.plain_sum) to.weighted_sum = nullptr;
  if (plan.plain_dots) to.dots = nullptr;
  return to;
}

// Per example: products over positions at the rate of a matrix product, then what the epilogue does
// with each number of the gradient.
template <typename T>
double engine_cost(double batch, double positions, double numbers, const Reduction<T>& to) {
  if (!to.any()) return 0;
  double epilogue = 6;
  epilogue += to.sq_norms ? 1 : 0;
  epilogue += to.dots ? 2 : 0;
  epilogue += to.weighted_sum ? 3 : 0;
  epilogue += to.second_moment ? 3 : 0;
  epilogue += to.sign_sum ? 6 : 0;
  epilogue += to.meet() ? 4 : 0;
  epilogue += to.sum_dots ? 4 : 0;
  epilogue += to.gram ? 0.65 * batch : 0;
  return batch * numbers * (positions + epilogue);
}

// Whether a Gram that is not wanted may be made on the way.
template <typename T>
bool has_room_for_gram(int64_t batch) {
  return batch * batch * int64_t{sizeof(T)} <= workspace() / 2;
}

// With one position: whether to take dots with the sum from the Gram, if that is not wanted anyway,
// or from the sum, which takes a product of matrices as large as the sum itself.
template <typename T>
bool rank_one_gram_is_cheap(int64_t batch, int64_t in, int64_t out, const Reduction<T>& to) {
  const double gram =
      0.5 * static_cast<double>(batch) * (1.2 * static_cast<double>(in + out) + kDotEnd);
  const double dots =
      static_cast<double>(in) * static_cast<double>(out) * (to.weighted_sum ? 1.1 : 2.1);
  return to.gram || (to.sum_dots && gram < dots && has_room_for_gram<T>(batch));
}

// A parameter [groups, out, in] with `positions` outer products for each example.
template <typename T>
Plan make_plan(int64_t batch, int64_t positions, int64_t in, int64_t out, int64_t groups,
               const Reduction<T>& to) {
  const double b = static_cast<double>(batch), t = static_cast<double>(positions);
  const double numbers = static_cast<double>(in) * out * groups;
  const double pair = (1.2 * static_cast<double>(in + out) + kDotEnd) * groups;
  Plan best;
  double least = std::numeric_limits<double>::infinity();
  const bool may_gram = to.gram || (to.sum_dots && has_room_for_gram<T>(batch));
  for (int choice = 0; choice < 16; ++choice) {
    const Plan plan{(choice & 1) && to.sq_norms, (choice & 2) && may_gram,
                    (choice & 4) && to.weighted_sum, (choice & 8) && to.dots && groups == 1};
    double cost = engine_cost(b, t, numbers, left_over(plan, to));
    if (plan.ghost_norms) cost += b * (t * (t + std::min(t, 64.0)) / 2 * pair + 1000);
    if (plan.ghost_gram) cost += b * (b + std::min(b, 64 / t + 1)) / 2 * t * t * pair;
    if (plan.plain_sum) cost += b * numbers * (t + 0.05);
    if (plan.plain_dots) cost += b * t * (1.1 * numbers + kDotEnd * static_cast<double>(out));
    if (cost < least) {
      least = cost;
      best = plan;
    }
  }
  return best;
}

// Whether dot products of two batches are cheaper as products of Grams than from tiles of all
// gradients of both.
inline bool cross_by_ghost(int64_t batch_a, int64_t positions_a, int64_t batch_b,
                           int64_t positions_b, int64_t in, int64_t out) {
  const double a = static_cast<double>(batch_a), b = static_cast<double>(batch_b);
  const double s = static_cast<double>(positions_a), t = static_cast<double>(positions_b);
  const double numbers = static_cast<double>(in) * static_cast<double>(out);
  const double pair = 1.2 * static_cast<double>(in + out) + kDotEnd;
  return a * s * b * t * pair < numbers * (a * (s + 10) + b * (t + 10) + 1.3 * a * b);
}

}  // namespace pc
