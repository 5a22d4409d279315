// Vectors of 64 bytes that the compiler maps to whatever the machine has, and functions compiled
// for several machines of which the loader picks one.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

// The levels ask for features; naming a processor (arch=haswell) would ask for that very model.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PC_CLONES
#endif

// What a cloned function calls must be inlined into it, or it would be compiled for the least
// machine.
#define PC_INLINE inline __attribute__((always_inline))

namespace pc {

template <typename T>
struct VectorOf {
  static constexpr int lanes = 64 / sizeof(T);
  typedef T type __attribute__((vector_size(64)));
  typedef T unaligned __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
PC_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <typename T>
PC_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

// The value with zeros after its first n lanes.
template <typename T>
PC_INLINE Vector<T> first_lanes(Vector<T> value, int64_t n) {
  constexpr int lanes = VectorOf<T>::lanes;
  if (n >= lanes) return value;
  Vector<T> result = {};
  for (int i = 0; i < lanes; ++i) result[i] = i < n ? value[i] : 0;
  return result;
}

// <a, b>, each lane in blocks of its own and their totals in double.
template <typename T>
PC_INLINE T dot(const T* a, const T* b, int64_t size) {
  constexpr int64_t lanes = VectorOf<T>::lanes, block = 256 * lanes;
  double total = 0;
  for (int64_t start = 0; start < size; start += block) {
    const int64_t end = start + block < size ? start + block : size;
    Vector<T> sums = {};
    int64_t i = start;
    for (; i + lanes <= end; i += lanes) sums += load(a + i) * load(b + i);
    for (; i < end; ++i) total += static_cast<double>(a[i]) * b[i];
    for (int lane = 0; lane < lanes; ++lane) total += sums[lane];
  }
  return static_cast<T>(total);
}

// In double, since the product of two such norms may be representable where they are not.
template <typename T>
PC_INLINE double sq_norm(const T* row, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += static_cast<double>(row[i]) * row[i];
  return total;
}

// Starts its memory at a cache line: a vector that lies across two takes twice the time to load.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  T* allocate(std::size_t n) { return static_cast<T*>(operator new(n * sizeof(T), line)); }
  void deallocate(T* memory, std::size_t) { operator delete(memory, line); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <typename T>
using Buffer = std::vector<T, LineAllocator<T>>;

}  // namespace pc
