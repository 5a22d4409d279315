// Vectors as wide as a machine has them, and functions compiled for several machines, one picked
// at run time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

// Code compiled for a better machine must be inlined into a function that says so.
#define PC_INLINE inline __attribute__((always_inline))
#define PC_INLINED __attribute__((always_inline))

namespace pc {

// Numbers in a line of the cache, the widest vectors there are.
template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);

template <typename T, int64_t bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};

// Bytes of a machine's vectors, and how many rows and vectors of accumulators its registers hold
// beside operands.
template <int64_t kBytes, int64_t kRows, int64_t kVectors>
struct Machine {
  static constexpr int64_t bytes = kBytes, rows = kRows, vectors = kVectors;
};

template <typename Machine, typename T>
using Vector = typename VectorOf<T, Machine::bytes>::type;

template <typename V>
using NumberOf = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <typename V>
constexpr int64_t kLanesOf = sizeof(V) / sizeof(NumberOf<V>);

// From and to anywhere in memory.
template <typename V>
PC_INLINE V load(const NumberOf<V>* from) {
  typedef V Unaligned __attribute__((aligned(alignof(NumberOf<V>)), may_alias));
  return *reinterpret_cast<const Unaligned*>(from);
}

template <typename V>
PC_INLINE void store(NumberOf<V>* to, V value) {
  typedef V Unaligned __attribute__((aligned(alignof(NumberOf<V>)), may_alias));
  *reinterpret_cast<Unaligned*>(to) = value;
}

// The first `count` lanes only, if they are fewer; the others are zeros.
template <typename V>
PC_INLINE V load_some(const NumberOf<V>* from, int64_t count) {
  if (count >= kLanesOf<V>) return load<V>(from);
  V result = {};
  for (int64_t i = 0; i < count; ++i) result[i] = from[i];
  return result;
}

// The first `count` lanes only, if they are fewer.
template <typename V>
PC_INLINE void store_some(NumberOf<V>* to, V value, int64_t count) {
  if (count >= kLanesOf<V>) return store(to, value);
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

// The sum of the lanes.
template <typename V>
PC_INLINE NumberOf<V> total(V value) {
  NumberOf<V> lanes[kLanesOf<V>];
  store(lanes, value);
#pragma GCC unroll 4
  for (int half = kLanesOf<V> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The sign of each lane; NaN for NaN.
template <typename V>
PC_INLINE V signs(V value) {
  const V zero = {}, one = zero + 1;
  const V nan = value == value ? zero : value;
  return (value > 0 ? one : zero) - (value < 0 ? one : zero) + nan;
}

// use.operator()<V>(i) for vectors at i that cover first .. size: the widest, then narrower ones
// for what is left.
template <typename V, typename Use>
PC_INLINE void each_vector(int64_t first, int64_t size, const Use& use) {
  constexpr int64_t lanes = kLanesOf<V>;
  for (; first + lanes <= size; first += lanes) use.template operator()<V>(first);
  if constexpr (lanes > 1) {
    using Half = typename VectorOf<NumberOf<V>, int64_t{sizeof(V)} / 2>::type;
    each_vector<Half>(first, size, use);
  }
}

// Lanes of a whose number has no bit `step` and, where it has, of b; of the lower halves of both
// pairs that the bit tells apart, or of the upper ones.
template <int step, bool upper, typename V, std::size_t... i>
PC_INLINE V halves(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(
      a, b, ((i & step ? kLanesOf<V> : 0) + (upper ? i | step : i & ~std::size_t{step}))...);
}

// Lane i is the sum of the lanes of values[i]: a vector for each lane, added up in pairs.
template <int step, typename V>
PC_INLINE V totals(const V* values) {
  constexpr std::make_index_sequence<kLanesOf<V>> all;
  if constexpr (step == 0) {
    return *values;
  } else {
    const V a = totals<step / 2, V>(values), b = totals<step / 2, V>(values + step);
    return halves<step, false>(a, b, all) + halves<step, true>(a, b, all);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

#if defined(__clang__) || __GNUC__ < 12
#define PC_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"
#define PC_AVX2 "avx2,fma,bmi2"
#else
#define PC_AVX512 "arch=x86-64-v4"
#define PC_AVX2 "arch=x86-64-v3"
#endif

template <typename Body>
__attribute__((target(PC_AVX512))) void on_avx512(const Body& body) {
  body(Machine<64, 8, 2>{});
}

template <typename Body>
__attribute__((target(PC_AVX2))) void on_avx2(const Body& body) {
  body(Machine<32, 4, 2>{});
}

// 0, 2 or 5 for none, AVX2 or AVX-512. ATEN_CPU_CAPABILITY, torch's own setting, can lower it.
inline int instruction_set() {
  static const int found = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const bool none = limit != nullptr && std::strcmp(limit, "default") == 0;
    const bool avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (none || !has_avx2) return 0;
    return avx2 || !has_avx512 ? 2 : 5;
  }();
  return found;
}

// Runs body(Machine<...>{}) as compiled for the best machine that this one is. The body, and all
// that it calls, must be PC_INLINED.
template <typename Body>
void vectorized(const Body& body) {
#ifdef PC_DEV
  return on_avx512(body);
#endif
  switch (instruction_set()) {
    case 5:
      return on_avx512(body);
    case 2:
      return on_avx2(body);
    default:
      body(Machine<16, 4, 2>{});
  }
}

#else

template <typename Body>
void vectorized(const Body& body) {
  body(Machine<16, 4, 2>{});
}

#endif

// The sum of term.operator()<V>(i), vectors at i of `size` numbers in memory, in blocks whose
// totals are added up in double.
template <typename Machine, typename T, typename Term>
PC_INLINE double sum_terms(int64_t size, const Term& term) {
  using V = Vector<Machine, T>;
  constexpr int64_t lanes = kLanesOf<V>, many = 4, block = 256 * many * lanes;
  double result = 0;
  for (int64_t start = 0; start < size; start += block) {
    const int64_t end = start + block < size ? start + block : size;
    V sums[many] = {};
    int64_t i = start;
    for (; i + many * lanes <= end; i += many * lanes) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < many; ++k) sums[k] += term.template operator()<V>(i + k * lanes);
    }
    for (; i + lanes <= end; i += lanes) sums[0] += term.template operator()<V>(i);
    if (i > start) result += total<V>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    each_vector<V>(i, end, [&]<typename Rest>(int64_t at) PC_INLINED {
      result += total<Rest>(term.template operator()<Rest>(at));
    });
  }
  return result;
}

// <a, b>
template <typename Machine, typename T>
PC_INLINE double dot(const T* a, const T* b, int64_t size) {
  return sum_terms<Machine, T>(
      size, [&]<typename V>(int64_t i) PC_INLINED { return load<V>(a + i) * load<V>(b + i); });
}

// <a, b> in double from the first.
template <typename T>
PC_INLINE double exact_dot(const T* a, const T* b, int64_t size) {
  constexpr int64_t lanes = 32;
  double sums[lanes] = {}, result = 0;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) sums[j] += static_cast<double>(a[i + j]) * b[i + j];
  }
  for (; i < size; ++i) result += static_cast<double>(a[i]) * b[i];
  for (int64_t j = 0; j < lanes; ++j) result += sums[j];
  return result;
}

// Starts its memory at a cache line: a vector that lies across two takes twice the time to load.
// An element that is not given a value has none.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t line{64};

  template <typename U>
  void construct(U* at) {
    ::new (static_cast<void*>(at)) U;
  }

  T* allocate(std::size_t n) { return static_cast<T*>(operator new(n * sizeof(T), line)); }
  void deallocate(T* memory, std::size_t) { operator delete(memory, line); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <typename T>
using Buffer = std::vector<T, LineAllocator<T>>;

}  // namespace pc
