// The lookups of a batch in a table, example by example, in the order of the table.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "panels.h"
#include "pc/vector.h"

namespace pc {

// The smallest and the largest of some ids; 0 and -1 if there are none.
inline std::pair<int64_t, int64_t> id_bounds(const int64_t* ids, int64_t count) {
  if (count == 0) return {0, -1};
  int64_t low = ids[0], high = ids[0];
  vectorized([&](auto) PC_INLINED {
    for (int64_t i = 0; i < count; ++i) {
      low = std::min(low, ids[i]);
      high = std::max(high, ids[i]);
    }
  });
  return {low, high};
}

// The largest of some ids, which must all be rows of the table.
inline int64_t check_ids(const std::string& op, const int64_t* ids, int64_t count, int64_t rows) {
  const auto [low, high] = id_bounds(ids, count);
  if (low >= 0 && high < rows) return high;
  throw std::out_of_range(op + ": expected ids in [0, " + std::to_string(rows) +
                          "), got ids from " + std::to_string(low) + " to " + std::to_string(high));
}

// A row of the table, and of the output gradient [B * T, D].
struct Lookup {
  int64_t id;
  int64_t at;
};

// The lookups of a batch without padding, in the order of their ids, then of their positions: those
// of a row of the table are neighbours, and among them those of an example.
class Lookups {
 public:
  // `high`: the largest id.
  Lookups(const int64_t* ids, int64_t batch, int64_t positions, int64_t padding, int64_t high)
      : batch_(batch), positions_(positions), list_(batch * positions) {
    int64_t count = 0;
    for (int64_t at = 0; at < batch * positions; ++at) {
      list_[count] = {ids[at], at};
      count += ids[at] != padding;
    }
    list_.resize(count);
    if (count > 0) sort(high);
  }

  int64_t batch() const { return batch_; }
  int64_t positions() const { return positions_; }
  int64_t count() const { return static_cast<int64_t>(list_.size()); }
  const Lookup& operator[](int64_t i) const { return list_[i]; }
  const Lookup* begin() const { return list_.data(); }
  const Lookup* end() const { return list_.data() + count(); }
  int64_t example(int64_t i) const { return list_[i].at / positions_; }

  // The end of the neighbours of i that share its id; of those in its example only, if `alone`.
  int64_t end_of(int64_t i, bool alone) const {
    const int64_t limit = (alone ? example(i) + 1 : batch_) * positions_;
    const auto shared = [&](int64_t j) {
      return j < count() && list_[j].id == list_[i].id && list_[j].at < limit;
    };
    // Few neighbours are found one by one, many by steps that double.
    int64_t step = 1;
    while (shared(i + step)) step *= 2;
    const Lookup* last = std::partition_point(
        begin() + i + step / 2, begin() + std::min(i + step, count()),
        [&](const Lookup& one) { return one.id == list_[i].id && one.at < limit; });
    return last - begin();
  }

  // The first from `start` on that is not such a neighbour of the one before.
  int64_t next_start(int64_t start, bool alone) const {
    return start == 0 || start >= count() ? start : end_of(start - 1, alone);
  }

 private:
  // Digit by digit, each in blocks that are counted and moved in parallel.
  void sort(int64_t high) {
    constexpr int64_t most = 11, block = 1 << 14;
    const int64_t bits = std::bit_width(static_cast<uint64_t>(high));
    const int64_t passes = std::max<int64_t>((bits + most - 1) / most, 1);
    const int64_t digit = (bits + passes - 1) / passes;
    const int64_t values = 1 << digit, blocks = (count() + block - 1) / block;
    Buffer<Lookup> moved(count());
    std::vector<int64_t> places;
    for (int64_t shift = 0; shift < bits; shift += digit) {
      places.assign(blocks * values, 0);
      const auto each = [&](const auto& use) {
        torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            int64_t* of_block = places.data() + i * values;
            for (int64_t j = i * block; j < std::min((i + 1) * block, count()); ++j) {
              use(of_block[list_[j].id >> shift & (values - 1)], list_[j]);
            }
          }
        });
      };
      each([](int64_t& place, const Lookup&) { ++place; });
      int64_t next = 0;
      for (int64_t value = 0; value < values; ++value) {
        for (int64_t i = 0; i < blocks; ++i) {
          next += std::exchange(places[i * values + value], next);
        }
      }
      each([&](int64_t& place, const Lookup& lookup) { moved[place++] = lookup; });
      list_.swap(moved);
    }
  }

  int64_t batch_, positions_;
  Buffer<Lookup> list_;
};

// to = the sum over lookups begin .. end of weight(i) * their rows of g, in some columns. Lookups
// without weight are left out.
template <typename Machine, int64_t vectors, typename T, typename Weight>
PC_INLINE void add_block(const Lookups& lookups, int64_t begin, int64_t end, const T* g,
                         int64_t width, const Weight& weight, T* to) {
  using V = Vector<Machine, T>;
  V sums[vectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const T* row = g + lookups[i].at * width;
    const T factor = weight(i);
    if (factor == 0) continue;
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) sums[v] += factor * load<V>(row + v * kLanesOf<V>);
  }
#pragma GCC unroll 4
  for (int64_t v = 0; v < vectors; ++v) store(to + v * kLanesOf<V>, sums[v]);
}

// The same, blocks of lookups being added up in double.
template <typename Machine, int64_t vectors, typename T, typename Weight>
PC_INLINE void add_blocks(const Lookups& lookups, int64_t begin, int64_t end, const T* g,
                          int64_t width, const Weight& weight, T* to) {
  if (end - begin <= kBlock) {
    return add_block<Machine, vectors>(lookups, begin, end, g, width, weight, to);
  }
  constexpr int64_t size = vectors * kLanesOf<Vector<Machine, T>>;
  double totals[size] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    add_block<Machine, vectors>(lookups, i, std::min(i + kBlock, end), g, width, weight, to);
    for (int64_t j = 0; j < size; ++j) totals[j] += to[j];
  }
  for (int64_t j = 0; j < size; ++j) to[j] = static_cast<T>(totals[j]);
}

// The same for any number of columns.
template <typename Machine, typename T, typename Weight>
PC_INLINE void add_up(const Lookups& lookups, int64_t begin, int64_t end, const T* g, int64_t width,
                      int64_t columns, const Weight& weight, T* to) {
  constexpr int64_t lanes = kLanesOf<Vector<Machine, T>>;
  int64_t d = 0;
  for (; d + 4 * lanes <= columns; d += 4 * lanes) {
    add_blocks<Machine, 4>(lookups, begin, end, g + d, width, weight, to + d);
  }
  for (; d + lanes <= columns; d += lanes) {
    add_blocks<Machine, 1>(lookups, begin, end, g + d, width, weight, to + d);
  }
  for (; d < columns; ++d) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const double factor = weight(i);
      if (factor != 0) sum += factor * g[lookups[i].at * width + d];
    }
    to[d] = static_cast<T>(sum);
  }
}

}  // namespace pc
