// For files of calls that run under sanitizers, without Python.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "pc/device.cuh"

namespace pc::tests {

using Call = void (*)();

// Those named "planted..." run when asked for, the others always.
inline std::map<std::string, Call>& calls() {
  static std::map<std::string, Call> all;
  return all;
}

// A static one of these adds a call.
struct Driven {
  Driven(const char* name, Call call) { calls()[name] = call; }
};

// Numbers on the heap, no two alike.
template <typename T>
std::vector<T> numbers(int64_t size) {
  std::vector<T> all(size);
  for (int64_t i = 0; i < size; ++i) all[i] = static_cast<T>(i * 7 % size - size / 2);
  return all;
}

}  // namespace pc::tests
