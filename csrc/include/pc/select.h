// Sorting and selection among values that lie in registers: numbers, or vectors of them that are
// sorted lane by lane. The same on CPU and GPU, and exact: values are compared, never subtracted.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PC_SELECT __host__ __device__ __forceinline__
#else
#define PC_SELECT inline __attribute__((always_inline))
#endif

namespace pc {

// One instruction each on a GPU too, which takes three for a comparison and two choices.
template <typename V>
PC_SELECT V lesser(V a, V b) {
#if defined(__CUDA_ARCH__)
  return fmin(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename V>
PC_SELECT V greater(V a, V b) {
#if defined(__CUDA_ARCH__)
  return fmax(a, b);
#else
  return a < b ? b : a;
#endif
}

// The smaller one to a.
template <typename V>
PC_SELECT void sort_two(V& a, V& b) {
  const V low = lesser(a, b);
  b = greater(a, b);
  a = low;
}

// Compares each value with the one `distance` further on, in the lower halves of blocks of twice
// the distance. Loops over templates, since no compiler unrolls a nest of them reliably.
template <int first, int last, int distance, typename V>
PC_SELECT void sort_apart(V* values) {
  if constexpr (first < last) {
    if constexpr ((first & distance) == 0) sort_two(values[first], values[first + distance]);
    sort_apart<first + 1, last, distance>(values);
  }
}

// Sorts a bitonic sequence: one that rises, then falls.
template <int size, typename V>
PC_SELECT void sort_bitonic(V* values) {
  if constexpr (size > 1) {
    sort_apart<0, size, size / 2>(values);
    sort_bitonic<size / 2>(values);
    sort_bitonic<size / 2>(values + size / 2);
  }
}

// Compares values from both ends, `first` to the middle.
template <int first, int size, typename V>
PC_SELECT void sort_mirrored(V* values) {
  if constexpr (first < size / 2) {
    sort_two(values[first], values[size - 1 - first]);
    sort_mirrored<first + 1, size>(values);
  }
}

// Sorts a power of two of values.
template <int size, typename V>
PC_SELECT void sort_all(V* values) {
  if constexpr (size > 1) {
    sort_all<size / 2>(values);
    sort_all<size / 2>(values + size / 2);
    sort_mirrored<0, size>(values);
    sort_bitonic<size / 2>(values);
    sort_bitonic<size / 2>(values + size / 2);
  }
}

// The `size` largest and the `size` smallest of a stream of values. Each value goes through both,
// and one that is in neither, or no longer, comes out. No sum is ever corrected by what it held.
template <int size, typename V>
struct Extremes {
  V top[size], bottom[size];  // each from the outside in

  // The value takes its place among the largest; returns what falls out.
  template <int i = 0>
  PC_SELECT V into_top(V value) {
    if constexpr (i == size) {
      return value;
    } else {
      const V high = greater(top[i], value), low = lesser(top[i], value);
      top[i] = high;
      return into_top<i + 1>(low);
    }
  }

  template <int i = 0>
  PC_SELECT V into_bottom(V value) {
    if constexpr (i == size) {
      return value;
    } else {
      const V low = lesser(value, bottom[i]), high = greater(value, bottom[i]);
      bottom[i] = low;
      return into_bottom<i + 1>(high);
    }
  }

  PC_SELECT V pass(V value) { return into_bottom(into_top(value)); }
};

}  // namespace pc
