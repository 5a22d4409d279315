// embedding_reduce on the CPU. Its schema and its truth: pycoherence/ops/embedding_reduce.py.

#include <algorithm>
#include <vector>

#include "lookup_gram.h"
#include "lookups.h"
#include "pc/vector.h"
#include "reduce_op.h"

namespace {

using pc::Lookups;
using pc::Outputs;
using pc::Reduction;
using pc::Tensor;

// Columns of the table, and numbers of g, that one task takes at most.
constexpr int64_t kColumns = 256, kNumbers = 1 << 14;

// Per-example results of each chunk of columns [chunks, B * T]: an example's in a row of the table
// is where it first looks it up.
class PerLookup {
 public:
  PerLookup(bool wanted, int64_t chunks, const Lookups& lookups)
      : batch_(lookups.batch()),
        positions_(lookups.positions()),
        values_(wanted ? chunks * batch_ * positions_ : 0) {}

  bool wanted() const { return !values_.empty(); }
  double& operator()(int64_t chunk, int64_t at) {
    return values_[chunk * batch_ * positions_ + at];
  }

  template <typename T>
  void add_up(T* to) const {
    if (!wanted()) return;
    const int64_t numbers = batch_ * positions_, end = static_cast<int64_t>(values_.size());
    const int64_t grain = std::max<int64_t>(kNumbers / positions_, 1);
    torch::stable::parallel_for(0, batch_, grain, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        double sum = 0;
        for (int64_t start = b * positions_; start < end; start += numbers) {
          for (int64_t t = 0; t < positions_; ++t) sum += values_[start + t];
        }
        to[b] = static_cast<T>(sum);
      }
    });
  }

 private:
  int64_t batch_, positions_;
  std::vector<double> values_;
};

// A sum over examples of a row of the table, some columns: blocks of them are added up in double.
template <typename T>
class Total {
 public:
  template <typename Value>
  PC_INLINE void add(int64_t size, const Value& value) {
    if (count_++ % pc::kBlock == 0) {
      fold(size);
      for (int64_t d = 0; d < size; ++d) block_[d] = value(d);
    } else {
      for (int64_t d = 0; d < size; ++d) block_[d] += value(d);
    }
  }

  PC_INLINE void finish(int64_t size, T* to) {
    if (count_ > pc::kBlock) {
      for (int64_t d = 0; d < size; ++d) to[d] = static_cast<T>(whole_[d] + block_[d]);
    } else {
      std::copy_n(block_, size, to);
    }
  }

 private:
  // count_: with the example that comes now.
  PC_INLINE void fold(int64_t size) {
    if (count_ == 1) return;
    if (count_ == pc::kBlock + 1) std::fill_n(whole_, size, 0.0);
    for (int64_t d = 0; d < size; ++d) whole_[d] += block_[d];
  }

  int64_t count_ = 0;
  T block_[kColumns];
  double whole_[kColumns];
};

// All but what needs examples in pairs.
template <typename T>
class Rows {
 public:
  // With few rows of the table, its columns must be what there is to share out.
  Rows(const Lookups& lookups, const T* g, int64_t rows, int64_t width, const Reduction<T>& to)
      : lookups_(lookups),
        g_(g),
        width_(width),
        to_(to),
        columns_(rows < 32 ? kColumns / 4 : kColumns),
        chunks_((width + columns_ - 1) / columns_),
        meet_(to.weighted_sum || to.second_moment || to.sign_sum || to.sum_dots),
        sq_norms_(to.sq_norms, chunks_, lookups),
        dots_(to.dots, chunks_, lookups),
        sum_dots_(to.sum_dots, chunks_, lookups) {}

  void run() {
    const int64_t step = std::max<int64_t>(kNumbers / std::min(width_, columns_), 1);
    const int64_t slices = (lookups_.count() + step - 1) / step;
    torch::stable::parallel_for(0, slices * chunks_, 1, [&](int64_t begin, int64_t end) {
      pc::vectorized([&](auto machine) PC_INLINED {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t start = task / chunks_ * step;
          const int64_t stop = std::min(start + step, lookups_.count());
          for (int64_t i = lookups_.next_start(start, !meet_); i < stop;) {
            const int64_t next = lookups_.end_of(i, !meet_);
            reduce_row<decltype(machine)>(i, next, task % chunks_);
            i = next;
          }
        }
      });
    });
    sq_norms_.add_up(to_.sq_norms);
    dots_.add_up(to_.dots);
    sum_dots_.add_up(to_.sum_dots);
  }

 private:
  // A row of the table, which lookups begin .. end share, in the columns of a chunk.
  template <typename Machine>
  PC_INLINE void reduce_row(int64_t begin, int64_t end, int64_t chunk) {
    const int64_t first = chunk * columns_, size = std::min(columns_, width_ - first);
    const int64_t place = lookups_[begin].id * width_ + first;
    T own[kColumns];
    T* weighted_sum = to_.weighted_sum ? to_.weighted_sum + place : own;
    if (to_.weighted_sum || to_.sum_dots) {
      const auto weight = [&](int64_t i) PC_INLINED {
        return to_.coef ? to_.coef[lookups_.example(i)] : T{1};
      };
      pc::add_up<Machine>(lookups_, begin, end, g_ + first, width_, size, weight, weighted_sum);
    }
    if (!(to_.sq_norms || to_.dots || to_.sum_dots || to_.second_moment || to_.sign_sum)) return;
    Total<T> second_moment, sign_sum;
    T scratch[kColumns];
    for (int64_t i = begin; i < end;) {
      const int64_t next = meet_ ? lookups_.end_of(i, true) : end, at = lookups_[i].at;
      const T* row = g_ + at * width_ + first;
      if (next - i > 1) {
        const auto ones = [](int64_t) PC_INLINED { return T{1}; };
        pc::add_up<Machine>(lookups_, i, next, g_ + first, width_, size, ones, scratch);
        row = scratch;
      }
      if (to_.sq_norms) sq_norms_(chunk, at) = pc::dot<Machine>(row, row, size);
      if (to_.dots) dots_(chunk, at) = pc::dot<Machine>(row, to_.direction + place, size);
      if (to_.sum_dots) sum_dots_(chunk, at) = pc::dot<Machine, T>(row, weighted_sum, size);
      if (to_.second_moment)
        second_moment.add(size, [&](int64_t d) PC_INLINED { return row[d] * row[d]; });
      if (to_.sign_sum)
        sign_sum.add(size, [&](int64_t d) PC_INLINED { return pc::sign_of(row[d]); });
      i = next;
    }
    if (to_.second_moment) second_moment.finish(size, to_.second_moment + place);
    if (to_.sign_sum) sign_sum.finish(size, to_.sign_sum + place);
  }

  const Lookups& lookups_;
  const T* g_;
  int64_t width_;
  Reduction<T> to_;
  int64_t columns_, chunks_;
  bool meet_;  // examples do, in the rows of the table
  PerLookup sq_norms_, dots_, sum_dots_;
};

// A sum of dot products: blocks of vectors are added up in double.
template <typename Machine, typename T>
class Dots {
 public:
  PC_INLINE void add(const T* a, const T* b, int64_t size) {
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) {
      sums_ += pc::load<V>(a + d) * pc::load<V>(b + d);
      if (++count_ % pc::kBlock == 0) fold();
    }
    for (; d < size; ++d) total_ += static_cast<double>(a[d]) * b[d];
  }

  PC_INLINE double finish() {
    fold();
    return total_;
  }

 private:
  using V = pc::Vector<Machine, T>;
  static constexpr int64_t kLanes = pc::kLanesOf<V>;

  PC_INLINE void fold() {
    total_ += pc::total<V>(sums_);
    sums_ = V{};
  }

  V sums_ = {};
  int64_t count_ = 0;
  double total_ = 0;
};

// Squared norms of examples that look up once, and dot products, for which ids need no order.
template <typename T>
void reduce_lookups(const int64_t* ids, const T* g, int64_t batch, int64_t positions, int64_t width,
                    int64_t padding, const Reduction<T>& to) {
  const int64_t grain = std::max<int64_t>(kNumbers / (positions * width), 1);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    pc::vectorized([&](auto machine) PC_INLINED {
      for (int64_t b = begin; b < end; ++b) {
        Dots<decltype(machine), T> sq_norm, dots;
        for (int64_t at = b * positions; at < (b + 1) * positions; ++at) {
          if (ids[at] == padding) continue;
          const T* row = g + at * width;
          if (to.sq_norms) sq_norm.add(row, row, width);
          if (to.dots) dots.add(row, to.direction + ids[at] * width, width);
        }
        if (to.sq_norms) to.sq_norms[b] = static_cast<T>(sq_norm.finish());
        if (to.dots) to.dots[b] = static_cast<T>(dots.finish());
      }
    });
  });
}

// Zeros in the rows of a table [V, D] that no lookup has.
template <typename T>
void clear_others(const Lookups& lookups, int64_t rows, int64_t width, T* table) {
  if (table == nullptr) return;
  const int64_t grain = std::max<int64_t>(kNumbers / width, 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const auto before = [](const pc::Lookup& lookup, int64_t row) { return lookup.id < row; };
    const pc::Lookup* next = std::lower_bound(lookups.begin(), lookups.end(), begin, before);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t used = next < lookups.end() ? std::min(next->id, end) : end;
      std::fill(table + row * width, table + used * width, T{0});
      row = used;
      while (next < lookups.end() && next->id == row) ++next;
    }
  });
}

template <typename T>
Outputs embedding_reduce(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                         int64_t padding_idx, const std::optional<Tensor>& coef,
                         const std::optional<Tensor>& direction, int64_t want) {
  const int64_t batch = g.size(0), positions = g.size(1), width = g.size(2);
  const pc::ReduceOp<T> op(g, {num_embeddings, width}, coef, direction, want);
  const Tensor wide = pc::prepare_ids(ids);
  const int64_t* found = wide.const_data_ptr<int64_t>();
  const int64_t high = pc::check_ids("embedding_reduce", found, wide.numel(), num_embeddings);
  if (std::min({batch, positions, width}) == 0) return pc::zeros(op.outputs);
  const Tensor rows = pc::prepare<T>(g);
  const T* g_rows = pc::read<T>(rows);
  const Reduction<T> to = op.pointers();
  const bool meet = to.weighted_sum || to.second_moment || to.sign_sum || to.meet();
  if (!meet && (positions == 1 || !to.sq_norms)) {
    reduce_lookups(found, g_rows, batch, positions, width, padding_idx, to);
    return op.outputs;
  }
  const Lookups lookups(found, batch, positions, padding_idx, high);
  Rows<T>(lookups, g_rows, num_embeddings, width, to).run();
  for (T* table : {to.weighted_sum, to.second_moment, to.sign_sum})
    clear_others(lookups, num_embeddings, width, table);
  if (to.gram) {
    pc::LookupRows<T> rows_of(lookups, g_rows, width);
    pc::lookup_gram(rows_of, rows_of, true, to.gram);
    pc::mirror(to.gram, batch);
  }
  return op.outputs;
}

Outputs embedding_reduce_cpu(const Tensor& ids, const Tensor& g, int64_t num_embeddings,
                             int64_t padding_idx, const std::optional<Tensor>& coef,
                             const std::optional<Tensor>& direction, int64_t want) {
  return g.scalar_type() == pc::ScalarType::Double
             ? embedding_reduce<double>(ids, g, num_embeddings, padding_idx, coef, direction, want)
             : embedding_reduce<float>(ids, g, num_embeddings, padding_idx, coef, direction, want);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pycoherence_native, CPU, m) {
  m.impl("embedding_reduce", TORCH_BOX(&embedding_reduce_cpu));
}
