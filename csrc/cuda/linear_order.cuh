// Kernel and launcher of linear_order for one position: a value is a number of g times one of x,
// made in registers. A block has a tile of the weight, `kOrderWide` inputs times some outputs, and
// holds the factors of some examples in shared memory, of all of them if they fit.
#pragma once

#include "order_select.cuh"

namespace pc {

constexpr int kOrderWide = 32;
constexpr int64_t kOrderStage = 48 << 10;

template <typename T, int owned>
struct LinearSource {
  static constexpr int high = kOrderThreads / kOrderWide * owned;
  static constexpr int64_t bytes = sizeof(T) * (kOrderWide + high);

  // How many examples are staged at a time.
  static int64_t room(int64_t batch) {
    return batch * bytes < kOrderStage ? batch : kOrderStage / bytes;
  }

  const T *x, *g;  // [batch, in], [batch, out]
  int64_t in, out;
  int examples, held;  // in the batch, staged at a time
  int64_t first_in, first_out;
  T *wide, *tall;  // staged: [held, kOrderWide], [held, high]
  int begin, end;  // which

  PC_DEVICE int batch() const { return examples; }
  PC_DEVICE bool again(bool wanted) const { return wanted || held < examples; }

  // Examples from `first`, if they are not there.
  PC_DEVICE void stage(int first, int last) {
    if (begin <= first && last <= end) return;
    sync();
    begin = first;
    end = first + held < examples ? first + held : examples;
    for (int i = thread(); i < (end - begin) * kOrderWide; i += kOrderThreads) {
      const int64_t column = first_in + i % kOrderWide;
      wide[i] = column < in ? x[(begin + i / kOrderWide) * in + column] : T(0);
    }
    for (int i = thread(); i < (end - begin) * high; i += kOrderThreads) {
      const int64_t column = first_out + i % high;
      tall[i] = column < out ? g[(begin + i / high) * out + column] : T(0);
    }
    sync();
  }

  PC_DEVICE Values<T, owned> at(int b) const {
    struct alignas(owned * sizeof(T) < 16 ? owned * sizeof(T) : 16) Some {
      T of[owned];
    };
    const Some some =
        reinterpret_cast<const Some*>(tall + (b - begin) * high)[thread() / kOrderWide];
    const T one = wide[(b - begin) * kOrderWide + thread() % kOrderWide];
    Values<T, owned> result;
    PC_UNROLL
    for (int i = 0; i < owned; ++i) result.of[i] = some.of[i] * one;
    return result;
  }

  template <typename Use>
  PC_DEVICE void each(int first, int last, const Use& use) {
    each_held(*this, held, first, last, use);
  }
};

// x: [batch, in], g: [batch, out], result: [out, in]
template <typename Way, typename T>
PC_KERNEL void linear_order_kernel(const T* x, const T* g, T* result, int batch, int64_t in,
                                   int64_t out, int held, Asked<T> asked) {
  constexpr int owned = Way::owned;
  using Source = LinearSource<T, owned>;
  const int64_t across = (in + kOrderWide - 1) / kOrderWide;
  const int64_t first_in = block() % across * kOrderWide,
                first_out = block() / across * Source::high;
  T* tall = shared_memory<T>();
  Source source{x,    g, in, out, batch, held, first_in, first_out, tall + held * Source::high,
                tall, 0, 0};
  T values[owned];
  Way::run(source, asked, values);
  const int64_t column = first_in + thread() % kOrderWide;
  PC_UNROLL
  for (int i = 0; i < owned; ++i) {
    const int64_t row = first_out + thread() / kOrderWide * owned + i;
    if (row < out && column < in) result[row * in + column] = values[i];
  }
}

// batch > 0
template <typename T>
cudaError_t launch_linear_order(const T* x, const T* g, T* result, int64_t batch, int64_t in,
                                int64_t out, const Order& order, cudaStream_t stream) {
  return with_way<T>(order, batch, [&]<typename Way>(Way, const Asked<T>& asked) {
    using Source = LinearSource<T, Way::owned>;
    const int64_t across = (in + kOrderWide - 1) / kOrderWide;
    const int64_t down = (out + Source::high - 1) / Source::high;
    const int64_t held = Source::room(batch);
    return launch(linear_order_kernel<Way, T>, across * down, kOrderThreads, held * Source::bytes,
                  stream, x, g, result, static_cast<int>(batch), in, out, static_cast<int>(held),
                  asked);
  });
}

}  // namespace pc
