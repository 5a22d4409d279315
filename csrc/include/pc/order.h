// The arguments of an order statistic. Its truth: pycoherence/ops/family/rules.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>

namespace pc {

enum class Rule {
  kWinsorizedMean,
  kTrimmedMean,
  kMedian,
  kLowerMedian,
  kMedianOfMeans,
  kSignAgreement,
  kPhocas,
  kMeaMed
};

struct Order {
  Rule rule;
  double k;   // how many, or the threshold of kSignAgreement
  bool drop;  // leaves values that are not finite out; otherwise they make the result NaN

  int64_t count() const { return static_cast<int64_t>(k); }

  // Whether the sums of all examples, or of groups of them, are enough.
  bool of_sums(Rule one) const { return rule == one && !drop; }

  bool clips() const { return rule == Rule::kWinsorizedMean || rule == Rule::kTrimmedMean; }
};

inline Order make_order(const std::string& rule, double k, bool drop) {
  constexpr const char* names[] = {"winsorized_mean", "trimmed_mean",   "median", "lower_median",
                                   "median_of_means", "sign_agreement", "phocas", "meamed"};
  const auto* found = std::find(std::begin(names), std::end(names), rule);
  if (found == std::end(names)) throw std::invalid_argument("unknown rule: " + rule);
  return {static_cast<Rule>(found - names), k, drop};
}

}  // namespace pc
