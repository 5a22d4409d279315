// The names of pc/device.cuh on the host: kernels run without a GPU, slowly, and are told where one
// would go wrong. A lane is a thread, so that sanitizers see races between lanes; blocks run one
// after the other; shared memory is NaN until written; asynchronous copies happen as late as they
// may.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>

#include "pc/emulation_team.h"

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

#define PC_KERNEL inline
#define PC_DEVICE inline
#define PC_UNROLL

namespace pc {

using Site = std::source_location;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent of a half is read as one of a float, 112 too small: right for subnormals too.
  const float scaled = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline int thread() { return emulation::lane->thread; }
inline int threads() { return emulation::lane->team.threads; }
inline int64_t block() { return emulation::lane->team.block; }
inline int64_t blocks() { return emulation::lane->team.blocks; }
inline int64_t thread_index() { return block() * threads() + thread(); }
inline int64_t thread_count() { return blocks() * threads(); }

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::lane->team.shared.data());
}

inline void sync(Site site = Site::current()) { emulation::lane->sync(site.line()); }
inline void sync_warp(Site site = Site::current()) { emulation::lane->sync_warp(site.line()); }

template <typename T>
T shuffle_xor(T value, int mask, Site site = Site::current()) {
  const int from = emulation::lane->index() ^ mask;
  return emulation::lane->exchange(value, site.line())(from);
}

template <typename T>
T shuffle(T value, int from, Site site = Site::current()) {
  return emulation::lane->exchange(value, site.line())(from);
}

template <typename T>
T shuffle_down(T value, int by, Site site = Site::current()) {
  const int own = emulation::lane->index(), from = own + by;
  return emulation::lane->exchange(value, site.line())(from < emulation::kWarp ? from : own);
}

inline bool any(bool value, Site site = Site::current()) {
  const auto of = emulation::lane->exchange(value, site.line());
  bool found = false;
  for (int i = 0; i < emulation::kWarp; ++i) found |= of(i);
  return found;
}

inline uint32_t ballot(bool value, Site site = Site::current()) {
  const auto of = emulation::lane->exchange(value, site.line());
  uint32_t bits = 0;
  for (int i = 0; i < emulation::kWarp; ++i) bits |= static_cast<uint32_t>(of(i)) << i;
  return bits;
}

inline int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }

inline void expect(bool fine, const char* what) {
  if (!fine) emulation::lane->team.fail(what);
}

template <int bytes>
void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulation::lane->copy(shared, global, bytes);
}

inline void commit_copies() { ++emulation::lane->group; }

template <int left>
void wait_copies() {
  emulation::lane->wait_copies(left);
}

// One of the two 16-bit numbers in a register, the first in the lower half.
template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * which)});
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Site site = Site::current()) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  Fragments own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  const auto of = emulation::lane->exchange(own, site.line());
  const int group = emulation::lane->index() / 4, place = emulation::lane->index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * place + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, right = k / 8;
      d[i] += half_of<T>(of(4 * group + holder).a[lower + 2 * right], k % 2) *
              half_of<T>(of(4 * column + holder).b[right], k % 2);
    }
  }
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t, Args... args) {
  constexpr int64_t kMostShared = 227 * 1024;
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT32_MAX || threads <= 0 || threads > emulation::kMostThreads ||
      threads % emulation::kWarp != 0 || shared_bytes < 0 || shared_bytes > kMostShared) {
    return cudaErrorInvalidValue;
  }
  emulation::Team(blocks, threads, shared_bytes).run([=] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace pc
