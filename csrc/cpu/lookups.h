// What the examples of a batch look up in a table, and the rows of their gradients.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "pc/vector.h"
#include "reduction.h"
#include "workspace.h"

namespace pc {

// For each example its positions in the order of their ids, without padding.
struct Lookups {
  std::vector<int64_t> ids;
  std::vector<int64_t> order;
  std::vector<int64_t> sizes;  // of each example's order
  int64_t positions;

  Lookups(const int64_t* from, int64_t batch, int64_t positions, int64_t padding)
      : ids(from, from + batch * positions),
        order(batch * positions),
        sizes(batch),
        positions(positions) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) sort(b, padding);
    });
  }

  int64_t batch() const { return static_cast<int64_t>(sizes.size()); }

 private:
  // Stable, so that equal ids are added up in the order of their positions.
  void sort(int64_t b, int64_t padding) {
    const int64_t* row = ids.data() + b * positions;
    const auto begin = order.begin() + b * positions;
    std::iota(begin, begin + positions, 0);
    const auto end =
        std::remove_if(begin, begin + positions, [&](int64_t t) { return row[t] == padding; });
    std::stable_sort(begin, end, [&](int64_t s, int64_t t) { return row[s] < row[t]; });
    sizes[b] = end - begin;
  }
};

// The rows of each example's gradient, one for each id that it looks up, in the order of the ids.
// Some columns of them are there at a time.
template <typename T>
struct LookupRows {
  LookupRows(const Lookups& lookups, const T* g, int64_t width)
      : width(width), starts(lookups.batch() + 1), lookups_(lookups), g_(g) {
    for (int64_t b = 0; b < lookups.batch(); ++b) {
      for (int64_t i = 0; i < lookups.sizes[b]; ++i) {
        if (is_new(b, i)) ids.push_back(id_at(b, i));
      }
      starts[b + 1] = static_cast<int64_t>(ids.size());
    }
  }

  int64_t batch() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t count() const { return static_cast<int64_t>(ids.size()); }

  void add_up(int64_t first, int64_t columns) {
    rows.assign(count() * columns, T{0});
    torch::stable::parallel_for(0, batch(), 1, [&](int64_t begin, int64_t end) {
      vectorized([&](auto) PC_INLINED {
        for (int64_t b = begin; b < end; ++b) {
          T* row = rows.data() + (starts[b] - 1) * columns;
          for (int64_t i = 0; i < lookups_.sizes[b]; ++i) {
            if (is_new(b, i)) row += columns;
            const T* from = g_ + position(b, i) * width + first;
            for (int64_t d = 0; d < columns; ++d) row[d] += from[d];
          }
        }
      });
    });
  }

  int64_t width;
  std::vector<int64_t> starts;  // of each example in ids and rows
  std::vector<int64_t> ids;
  Buffer<T> rows;

 private:
  int64_t position(int64_t b, int64_t i) const {
    return b * lookups_.positions + lookups_.order[b * lookups_.positions + i];
  }

  int64_t id_at(int64_t b, int64_t i) const { return lookups_.ids[position(b, i)]; }
  bool is_new(int64_t b, int64_t i) const { return i == 0 || id_at(b, i) != id_at(b, i - 1); }

  const Lookups& lookups_;
  const T* g_;
};

// The dot products of the rows that two examples share.
template <typename Machine, typename T>
PC_INLINE double shared_dots(const LookupRows<T>& a, int64_t i, const LookupRows<T>& b, int64_t j,
                             int64_t columns) {
  double sum = 0;
  int64_t s = a.starts[i], t = b.starts[j];
  while (s < a.starts[i + 1] && t < b.starts[j + 1]) {
    if (a.ids[s] == b.ids[t]) {
      sum += dot<Machine>(a.rows.data() + s * columns, b.rows.data() + t * columns, columns);
    }
    const bool behind = a.ids[s] <= b.ids[t];
    t += a.ids[s] >= b.ids[t];
    s += behind;
  }
  return sum;
}

// gram [B1, B2], if b is a the upper triangle; as many columns at a time as the workspace holds.
template <typename T>
void lookup_gram(LookupRows<T>& a, LookupRows<T>& b, bool same, T* gram) {
  const int64_t rows = std::max<int64_t>(a.count() + (same ? 0 : b.count()), 1);
  const int64_t room = workspace() / int64_t{sizeof(T)} / rows / kLine<T>;
  const int64_t step = std::max<int64_t>(room, 1) * kLine<T>;
  std::fill_n(gram, a.batch() * b.batch(), T{0});
  for (int64_t first = 0; first < a.width; first += step) {
    const int64_t columns = std::min(step, a.width - first);
    a.add_up(first, columns);
    if (!same) b.add_up(first, columns);
    torch::stable::parallel_for(0, a.batch(), 1, [&](int64_t begin, int64_t end) {
      vectorized([&](auto machine) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = same ? fold(task, a.batch()) : task;
          for (int64_t j = same ? i : 0; j < b.batch(); ++j) {
            gram[i * b.batch() + j] +=
                static_cast<T>(shared_dots<decltype(machine)>(a, i, b, j, columns));
          }
        }
      });
    });
  }
}

}  // namespace pc
