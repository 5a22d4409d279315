// The threads of a block on the host: where they meet, what they share, and what is held against
// them.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace pc::emulation {

constexpr int kWarp = 32, kMostThreads = 1024;

// An act of a kernel that no GPU forgives; launch throws it.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the lanes of a block that has failed.
struct Stopped {};

// The order of the blocks of a grid: no result may depend on it.
enum class Order { forward, reversed, shuffled };
inline Order order = Order::forward;

// A place for some lanes to meet. There is no lock, since one that other lanes take too would hide
// their races.
struct Meeting {
  int size = 0;
  std::atomic<int> arrived{0}, turn{0};
  std::atomic<unsigned> line{0};  // of the call that the first lane came to
};

// The value that a lane shows to the others of its warp.
struct alignas(16) Slot {
  std::byte bytes[24];
};

class Team;

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

// A thread of a block.
struct Lane {
  Team& team;
  const int thread;
  int group = 0;               // of copies, the one that is still open
  std::vector<Copy> copies{};  // not yet made
  int side = 0;                // of the slots, which are used in turns

  int index() const { return thread % kWarp; }
  int warp() const { return thread / kWarp; }
  void sync(unsigned line);
  void sync_warp(unsigned line);
  void copy(void* to, const void* from, int bytes);
  void wait_copies(int left);
  template <typename T>
  auto exchange(const T& value, unsigned line);
};

inline thread_local Lane* lane = nullptr;

class Team {
 public:
  const int64_t blocks;
  const int threads;
  int64_t block = 0;
  std::vector<std::byte> shared;  // on the heap and no larger than asked for, as sanitizers like it
  std::vector<Meeting> meetings;  // of the block, then of each warp
  std::vector<Slot> slots;        // [warps, 2, kWarp]

  Team(int64_t blocks, int threads, int64_t shared_bytes)
      : blocks(blocks),
        threads(threads),
        shared(shared_bytes),
        meetings(1 + threads / kWarp),
        slots(2 * threads),
        places_(blocks) {
    for (Meeting& meeting : meetings) meeting.size = kWarp;
    meetings[0].size = threads;
    std::iota(places_.begin(), places_.end(), 0);
    if (order == Order::reversed) std::reverse(places_.begin(), places_.end());
    if (order == Order::shuffled) {
      std::shuffle(places_.begin(), places_.end(), std::mt19937(1));
    }
  }

  // The kernel, in all lanes of all blocks.
  void run(const std::function<void()>& kernel) {
    std::barrier next_block(threads, [this]() noexcept { next(); });
    std::vector<std::thread> lanes;
    for (int thread = 0; thread < threads; ++thread) {
      lanes.emplace_back([&, thread] {
        for (next_block.arrive_and_wait(); !done_; next_block.arrive_and_wait()) {
          work(thread, kernel);
        }
      });
    }
    for (std::thread& each : lanes) each.join();
    if (stopped_) throw Fault(fault_);
  }

  // Waits for the other lanes of the meeting, which must come to the same line.
  void meet(Meeting& meeting, unsigned line) {
    const int turn = meeting.turn.load(std::memory_order_acquire);
    if (stopped_.load(std::memory_order_relaxed)) throw Stopped{};
    unsigned first = 0;
    if (!meeting.line.compare_exchange_strong(first, line, std::memory_order_relaxed) &&
        first != line) {
      fail("divergent: threads meet from line " + std::to_string(std::min(first, line)) +
           " and from line " + std::to_string(std::max(first, line)));
    }
    if (meeting.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < meeting.size) {
      rest(kWaits);
      meeting.turn.wait(turn, std::memory_order_acquire);
      if (stopped_.load(std::memory_order_relaxed)) throw Stopped{};
      return;
    }
    meeting.arrived.store(0, std::memory_order_relaxed);
    meeting.line.store(0, std::memory_order_relaxed);
    resting_.fetch_sub((meeting.size - 1) * kWaits, std::memory_order_relaxed);
    meeting.turn.fetch_add(1, std::memory_order_acq_rel);
    meeting.turn.notify_all();
  }

  [[noreturn]] void fail(const std::string& what) {
    if (!stopped_.exchange(true)) {
      fault_ = what;
      for (Meeting& meeting : meetings) {
        meeting.turn.fetch_add(1);
        meeting.turn.notify_all();
      }
    }
    throw Stopped{};
  }

 private:
  // A lane that waits counts as 1 and one that is through also in the upper half.
  static constexpr int64_t kWaits = 1, kEnds = kWaits + (int64_t{1} << 32);

  // Called by the last lane to end a block.
  void next() {
    done_ = stopped_ || place_ == blocks;
    if (done_) return;
    block = places_[place_++];
    resting_ = 0;
    std::fill(shared.begin(), shared.end(), std::byte{0xff});
  }

  void work(int thread, const std::function<void()>& kernel) {
    Lane own{*this, thread};
    lane = &own;
    try {
      kernel();
      rest(kEnds);
    } catch (const Stopped&) {
    }
  }

  // Counts a lane that no longer runs; if none does and not all have ended, they wait for ever.
  // A count is taken back before its lane goes on, so that it is never too high.
  void rest(int64_t how) {
    const int64_t now = resting_.fetch_add(how, std::memory_order_relaxed) + how;
    const int64_t ended = now >> 32, all = now & 0xffffffff;
    if (all != threads || ended == threads) return;
    std::string lines;
    for (const Meeting& meeting : meetings) {
      const std::string line = std::to_string(meeting.line.load(std::memory_order_relaxed));
      if (line != "0" && lines.find(line) == std::string::npos) lines += " " + line;
    }
    fail("divergent: " + std::to_string(threads - ended) + " threads of " +
         std::to_string(threads) + " wait at line" + lines + " for others, and " +
         std::to_string(ended) + " have ended");
  }

  std::vector<int64_t> places_;  // the blocks in their order
  int64_t place_ = 0;
  bool done_ = false;
  std::atomic<int64_t> resting_{0};
  std::atomic<bool> stopped_{false};
  std::string fault_;
};

inline void Lane::sync(unsigned line) { team.meet(team.meetings[0], line); }

inline void Lane::sync_warp(unsigned line) { team.meet(team.meetings[1 + warp()], line); }

inline void Lane::copy(void* to, const void* from, int bytes) {
  const auto address = std::bit_cast<uintptr_t>(to) | std::bit_cast<uintptr_t>(from);
  if (address % bytes != 0) team.fail("copy_async: " + std::to_string(bytes) + " unaligned bytes");
  copies.push_back({to, from, bytes, group});
}

inline void Lane::wait_copies(int left) {
  std::erase_if(copies, [&](const Copy& copy) {
    if (copy.group >= group - left) return false;
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

// The value of each lane of the warp, by its index. The slots of this turn are written again
// after the next one, and no lane comes to that before all have read.
template <typename T>
auto Lane::exchange(const T& value, unsigned line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Slot));
  Slot* shown = &team.slots[(2 * warp() + side) * kWarp];
  side ^= 1;
  std::memcpy(shown[index()].bytes, &value, sizeof(T));
  sync_warp(line);
  return [shown](int index) {
    T value;
    std::memcpy(&value, shown[index].bytes, sizeof(T));
    return value;
  };
}

}  // namespace pc::emulation
