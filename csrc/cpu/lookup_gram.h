// Dot products of the gradients of an embedding table: of the rows that two examples share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "lookups.h"
#include "reduction.h"
#include "workspace.h"

namespace pc {

// The gradients of a batch: a row for each id that an example looks up, in the order of sorted
// lookups. Some columns of them are there at a time.
template <typename T>
class LookupRows {
 public:
  LookupRows(const Lookups& lookups, const T* g, int64_t width)
      : width(width), starts(lookups.batch() + 1), lookups_(lookups), g_(g) {
    for (int64_t i = 0; i < lookups.count(); i = lookups.end_of(i, true)) firsts_.push_back(i);
    for (int64_t row = 0; row < count(); ++row) ++starts[example(row) + 1];
    for (int64_t b = 0; b < batch(); ++b) starts[b + 1] += starts[b];
    std::vector<int64_t> next = starts;
    order.resize(count());
    for (int64_t row = 0; row < count(); ++row) order[next[example(row)]++] = row;
  }

  int64_t batch() const { return lookups_.batch(); }
  int64_t count() const { return static_cast<int64_t>(firsts_.size()); }
  int64_t id(int64_t row) const { return lookups_[firsts_[row]].id; }
  int64_t example(int64_t row) const { return lookups_.example(firsts_[row]); }

  void add_up(int64_t first, int64_t columns) {
    rows.resize(count() * columns);
    torch::stable::parallel_for(0, count(), 64, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t last = row + 1 < count() ? firsts_[row + 1] : lookups_.count();
          pc::add_up<decltype(machine)>(
              lookups_, firsts_[row], last, g_ + first, width, columns,
              [](int64_t) PC_INLINED { return T{1}; }, rows.data() + row * columns);
        }
      });
    });
  }

  int64_t width;
  std::vector<int64_t> starts;  // of each example in `order`
  std::vector<int64_t> order;   // the rows of each example
  Buffer<T> rows;

 private:
  std::vector<int64_t> firsts_;  // lookup of each row
  const Lookups& lookups_;
  const T* g_;
};

// For each row of a the rows of b with its id; in one batch only those from itself on.
template <typename T>
std::vector<std::pair<int64_t, int64_t>> matches(const LookupRows<T>& a, const LookupRows<T>& b,
                                                 bool same) {
  std::vector<std::pair<int64_t, int64_t>> found(a.count());
  int64_t begin = 0, end = 0;
  for (int64_t row = 0; row < a.count(); ++row) {
    if (row == 0 || a.id(row) != a.id(row - 1)) {
      begin = end;
      while (begin < b.count() && b.id(begin) < a.id(row)) ++begin;
      end = begin;
      while (end < b.count() && b.id(end) == a.id(row)) ++end;
    }
    found[row] = {same ? row : begin, end};
  }
  return found;
}

// gram [B1, B2], if b is a the upper triangle; the workspace limits the columns at a time.
template <typename T>
void lookup_gram(LookupRows<T>& a, LookupRows<T>& b, bool same, T* gram) {
  const int64_t rows = std::max<int64_t>(a.count() + (same ? 0 : b.count()), 1);
  const int64_t room = workspace() / int64_t{sizeof(T)} / rows / kLine<T>;
  const int64_t step = std::max<int64_t>(room, 1) * kLine<T>;
  const auto shared = matches(a, b, same);
  std::fill_n(gram, a.batch() * b.batch(), T{0});
  for (int64_t first = 0; first < a.width; first += step) {
    const int64_t columns = std::min(step, a.width - first);
    a.add_up(first, columns);
    if (!same) b.add_up(first, columns);
    torch::stable::parallel_for(0, a.batch(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sums(b.batch());
      vectorized([&](auto machine) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = same ? fold(task, a.batch()) : task, from = same ? i : 0;
          std::fill(sums.begin() + from, sums.end(), 0.0);
          for (int64_t k = a.starts[i]; k < a.starts[i + 1]; ++k) {
            const T* row = a.rows.data() + a.order[k] * columns;
            for (int64_t j = shared[a.order[k]].first; j < shared[a.order[k]].second; ++j) {
              sums[b.example(j)] +=
                  dot<decltype(machine)>(row, b.rows.data() + j * columns, columns);
            }
          }
          for (int64_t j = from; j < b.batch(); ++j) {
            gram[i * b.batch() + j] += static_cast<T>(sums[j]);
          }
        }
      });
    });
  }
}

}  // namespace pc
