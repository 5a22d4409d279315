// How much memory a kernel may take beside its inputs and outputs.
#pragma once

#include <atomic>
#include <cstdint>

namespace pc {

// In bytes, for all kernels; set from Python, as for those of the CPU.
inline std::atomic<int64_t> workspace{64 << 20};

}  // namespace pc
