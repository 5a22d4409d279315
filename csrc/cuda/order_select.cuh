// Order statistics of more values than registers hold: they are gone through again and again, and
// a rank is found by bisection between floating-point numbers, exactly.
#pragma once

#include <stdexcept>
#include <string>

#include "order_ways.cuh"

namespace pc {

// Whole numbers in the order of the floating-point numbers that they stand for.
template <typename T>
struct Key {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr int bits = 8 * sizeof(T);
  static constexpr Bits sign = Bits{1} << (bits - 1);

  union Both {
    T number;
    Bits bits;
  };

  PC_DEVICE static Bits of(T number) {
    Both both;
    both.number = number;
    return both.bits & sign ? ~both.bits : both.bits | sign;
  }
  PC_DEVICE static T number(Bits key) {
    Both both;
    both.bits = key & sign ? key ^ sign : ~key;
    return both.number;
  }
};

// A column that is made anew whenever it is asked for: the values, or means of groups of them.
template <bool means, typename T, typename Source>
class Stream {
 public:
  PC_DEVICE Stream(Source& source, const Asked<T>& asked) : source_(source), asked_(asked) {
    each([&](int, T value) {
      const bool kept = means ? value == value : is_finite(value);
      count_ += kept;
      below_ += !kept && value == -kInfinity<T>;
      least_ = kept ? lesser(least_, value) : least_;
      most_ = kept ? greater(most_, value) : most_;
    });
  }

  PC_DEVICE int count() const { return count_; }

  PC_DEVICE void at(int i, int j, T& low, T& high) const {
    using Bits = typename Key<T>::Bits;
    const int left = i + below_, right = j + below_;
    Bits a = Key<T>::of(least_), b = Key<T>::of(most_), c = a, d = b;
    for (int step = 0; step < Key<T>::bits && source_.again(a < b || c < d); ++step) {
      const Bits first = a + (b - a) / 2, second = c + (d - c) / 2;
      const T one = Key<T>::number(first), two = Key<T>::number(second);
      int ones = 0, twos = 0;
      each([&](int, T value) {
        ones += value <= one;
        twos += value <= two;
      });
      if (a < b) (ones > left ? b : a) = ones > left ? first : first + 1;
      if (c < d) (twos > right ? d : c) = twos > right ? second : second + 1;
    }
    low = Key<T>::number(a);
    high = Key<T>::number(c);
  }

  // Equal values at either end count as often as there are ranks.
  PC_DEVICE T sum(int first, int last, T low, T high) const {
    Sum<T> inner = {};
    int under = -below_, over = -below_;
    each([&](int b, T value) {
      const bool inside = low < value && value < high;
      inner.add(b, inside ? value : T(0));
      under += value <= low;
      over += value < high;
    });
    const T ends = static_cast<T>(under - first) * low + static_cast<T>(last - over) * high;
    return low < high ? inner.get() + ends : static_cast<T>(last - first) * low;
  }

 private:
  template <typename Use>
  PC_DEVICE void each(const Use& use) const {
    if constexpr (means) {
      int j = 0;
      each_mean(source_, asked_, [&](T mean) { use(j++, mean); });
    } else {
      source_.each(0, source_.batch(), [&](int b, const auto& values) { use(b, values.of[0]); });
    }
  }

  Source& source_;
  const Asked<T>& asked_;
  int count_ = 0, below_ = 0;
  T least_ = kInfinity<T>, most_ = -kInfinity<T>;
};

template <bool means>
struct Streams {
  static constexpr int owned = 1;

  template <typename T, typename Source>
  PC_DEVICE static void run(Source& source, const Asked<T>& asked, T (&result)[owned]) {
    const Stream<means, T, Source> column(source, asked);
    const int count = column.count();
    const T found = of_sorted(column, count, asked);
    result[0] = count < asked.least(means ? asked.k : source.batch()) ? kNan<T> : found;
  }
};

// run(Way{}, asked) with the way that suits a rule and a batch.
template <typename T, typename Run>
auto with_way(const Order& order, int64_t batch, const Run& run) {
  constexpr int64_t most = int64_t{1} << 30;
  if (batch > most) {
    throw std::length_error("order statistics on CUDA: expected a batch of at most 2^30, got " +
                            std::to_string(batch));
  }
  Asked<T> asked{order.rule, static_cast<int>(order.k), static_cast<T>(order.k), order.drop};
  const int k = asked.k;
  if (order.rule == Rule::kSignAgreement) return run(Sums{}, asked);
  if (order.clips() && k == 0) {
    asked.share = 0;
    return run(Sums{}, asked);
  }
  if (order.rule == Rule::kMedianOfMeans) {
    if (k <= 8) return run(Means<8>{}, asked);
    if (k <= 32) return run(Means<32>{}, asked);
    return run(Streams<true>{}, asked);
  }
  if (order.clips()) {
    const int size = order.rule == Rule::kWinsorizedMean ? k + 1 : k;
    const auto ends = [&]<int some>(std::integral_constant<int, some>) {
      return order.drop ? run(Ends<some, true>{}, asked) : run(Ends<some, false>{}, asked);
    };
    if (size == 1 && batch >= 2) return ends(std::integral_constant<int, 1>{});
    if (size == 2 && batch >= 4) return ends(std::integral_constant<int, 2>{});
    if (size == 3 && batch >= 6) return ends(std::integral_constant<int, 3>{});
    if (size == 4 && batch >= 8) return ends(std::integral_constant<int, 4>{});
    if (size <= 8 && batch > 32) return ends(std::integral_constant<int, 8>{});
    if (size <= 16 && batch > 64) return ends(std::integral_constant<int, 16>{});
  }
  if (batch <= 8) return run(Network<8>{}, asked);
  if (batch <= 16) return run(Network<16>{}, asked);
  if (batch <= 32) return run(Network<32>{}, asked);
  if constexpr (sizeof(T) == 4) {
    if (batch <= 64) return run(Network<64>{}, asked);
    if (batch <= 128) return run(Network<128>{}, asked);
  }
  return run(Streams<false>{}, asked);
}

}  // namespace pc
