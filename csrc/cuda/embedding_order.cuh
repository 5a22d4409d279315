// Kernel and launcher of embedding_order: a block finds the rows of the table that begin among some
// lookups, which are sorted, and takes some columns of them. A thread adds up what the lookups of
// an example give its columns, in a place of its own in shared memory, so that none waits for
// another.
#pragma once

#include "lookups.cuh"
#include "order_select.cuh"

namespace pc {

// Columns of a block at a time; lookups among which it finds rows.
constexpr int kTableThreads = 32, kTableLookups = 8;
constexpr int64_t kTableStage = 48 << 10;

template <typename T, int owned>
struct LookupSource {
  static constexpr int64_t bytes = sizeof(T) * kTableThreads * owned;

  // How many examples are held at a time.
  static int64_t room(int64_t batch) {
    return batch * bytes < kTableStage ? batch : kTableStage / bytes;
  }

  const Lookups<T>& lookups;
  int examples, held;    // in the batch, at a time
  int64_t first, stop;   // lookups of the row
  int64_t steps[owned];  // to the thread's columns, to the last one where there is none
  T* values;             // [held, owned, kTableThreads], from the thread's own
  int begin, end;        // which

  PC_DEVICE int batch() const { return examples; }
  PC_DEVICE bool again(bool wanted) const { return wanted; }
  PC_DEVICE T& value(int b, int i) const {
    return values[((b - begin) * owned + i) * kTableThreads];
  }

  PC_DEVICE Values<T, owned> at(int b) const {
    Values<T, owned> result;
    PC_UNROLL
    for (int i = 0; i < owned; ++i) result.of[i] = value(b, i);
    return result;
  }

  // Examples from `from`, if they are not there.
  PC_DEVICE void stage(int from, int to) {
    if (begin <= from && to <= end) return;
    begin = from;
    end = from + held < examples ? from + held : examples;
    add_up(start_of(begin), end < examples ? start_of(end) : stop);
  }

  template <typename Use>
  PC_DEVICE void each(int from, int to, const Use& use) {
    each_held(*this, held, from, to, use);
  }

 private:
  PC_DEVICE int64_t start_of(int b) const {
    const int64_t place = b * lookups.positions;
    return first_of(first, stop, [&](int64_t j) { return lookups.place(j) >= place; });
  }

  // Adds up the examples that are held: zeros for those that do not look the row up.
  PC_DEVICE void add_up(int64_t start, int64_t last) {
    constexpr int ahead = 4;  // rows that are under way together
    Sum<T> sums[owned] = {};
    int b = begin, count = 0;
    const auto finish = [&] {
      PC_UNROLL
      for (int i = 0; i < owned; ++i) {
        value(b, i) = sums[i].get();
        sums[i] = {};
      }
      count = 0;
      ++b;
    };
    for (int64_t j = start; j < last; j += ahead) {
      int64_t places[ahead];
      T rows[ahead][owned];
      PC_UNROLL
      for (int k = 0; k < ahead; ++k) {
        places[k] = lookups.place(j + k < last ? j + k : last - 1);
        PC_UNROLL
        for (int i = 0; i < owned; ++i) {
          rows[k][i] = lookups.g[places[k] * lookups.width + steps[i]];
        }
      }
      PC_UNROLL
      for (int k = 0; k < ahead; ++k) {
        if (j + k >= last) break;
        while (places[k] >= (b + 1) * lookups.positions) finish();
        PC_UNROLL
        for (int i = 0; i < owned; ++i) sums[i].add(count, rows[k][i]);
        ++count;
      }
    }
    while (b < end) finish();
  }
};

// The end of the lookups of an id that begin at i: most are few.
template <typename T>
PC_DEVICE int64_t run_end(const Lookups<T>& lookups, int64_t i) {
  const int64_t id = lookups.ids[i];
  int64_t last = i, step = 1;
  while (i + step < lookups.count && lookups.ids[i + step] == id) {
    last = i + step;
    step *= 2;
  }
  const int64_t limit = i + step < lookups.count ? i + step : lookups.count;
  return first_of(last, limit, [&](int64_t j) { return lookups.ids[j] != id; });
}

// table: [rows, width], zeros
template <typename Way, typename T>
PC_KERNEL void embedding_order_kernel(Lookups<T> lookups, T* table, int64_t rows, int64_t padding,
                                      int batch, int held, int64_t tiles, Asked<T> asked) {
  constexpr int owned = Way::owned;
  using Source = LookupSource<T, owned>;
  const int64_t column = block() % tiles * kTableThreads * owned + thread();
  const int64_t first = block() / tiles * kTableLookups;
  for (int64_t i = first; i < first + kTableLookups && i < lookups.count; ++i) {
    const int64_t id = lookups.ids[i];
    expect(0 <= id && id < rows, "embedding_order: an id is out of range");
    if (id == padding || !lookups.begins_run(i)) continue;
    Source source{lookups, batch, held, i, run_end(lookups, i), {}, shared_memory<T>() + thread(),
                  0,       0};
    PC_UNROLL
    for (int c = 0; c < owned; ++c) {
      const int64_t own = column + c * kTableThreads;
      source.steps[c] = own < lookups.width ? own : lookups.width - 1;
    }
    T result[owned];
    Way::run(source, asked, result);
    PC_UNROLL
    for (int c = 0; c < owned; ++c) {
      const int64_t own = column + c * kTableThreads;
      if (own < lookups.width) table[id * lookups.width + own] = result[c];
    }
  }
}

// batch, lookups.count, lookups.width > 0
template <typename T>
cudaError_t launch_embedding_order(const Lookups<T>& lookups, T* table, int64_t rows,
                                   int64_t padding, int64_t batch, const Order& order,
                                   cudaStream_t stream) {
  return with_way<T>(order, batch, [&]<typename Way>(Way, const Asked<T>& asked) {
    using Source = LookupSource<T, Way::owned>;
    constexpr int64_t wide = kTableThreads * Way::owned;
    const int64_t tiles = (lookups.width + wide - 1) / wide, held = Source::room(batch);
    const int64_t parts = (lookups.count + kTableLookups - 1) / kTableLookups;
    return launch(embedding_order_kernel<Way, T>, parts * tiles, kTableThreads,
                  held * Source::bytes, stream, lookups, table, rows, padding,
                  static_cast<int>(batch), static_cast<int>(held), tiles, asked);
  });
}

}  // namespace pc
